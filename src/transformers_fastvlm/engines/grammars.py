# SPDX-License-Identifier: Apache-2.0
"""Enforce a schema on an answer, token by token, with llguidance."""

import functools
import json
from collections.abc import Collection
from typing import Any

import numpy as np

from .._optional import needs
from .answer_schema import Schema

__all__ = ["Grammars", "Matcher"]

_KEPT = 32  # compiled schemas
_MOST_SYMBOLS = 20_000  # of a grammar; the time to compile an object grows with the square of its properties
# These override what a schema has under "x-guidance". With flexible white space, a weak model fills its limit with
# blanks; with lenient, unknown keywords would be ignored.
_JSON_OPTIONS: Any = {
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "lenient": False,
    "coerce_one_of": False,
}


class Grammars:
    """The schemas of one model, compiled once each; the most recently used are kept. Thread-safe.

    Args:
        tokenizer: the checkpoint's tokenizer.
        ends: tokens that end an answer.
        vocabulary: number of the model's logits.

    Raises:
        ImportError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], vocabulary: int) -> None:
        with needs("llguidance", "An answer that follows a schema", 'pip install "transformers-fastvlm[schema]"'):
            import llguidance
            import llguidance.hf
        self._library, self._ends = llguidance, sorted(ends)
        size = max(vocabulary, len(tokenizer))
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=self._ends or None)
        added = [*tokenizer.added_tokens_decoder]
        self._texts = _packed(size, [token for token in range(len(tokenizer)) if token not in set(added)])
        self._end_bits = _packed(size, self._ends)
        self._compiled = functools.lru_cache(maxsize=_KEPT)(self._compile)

    def matcher(self, schema: Schema) -> "Matcher":
        """Return a matcher at the beginning of an answer.

        Raises:
            ValueError: the schema is not supported, and why.
        """
        return Matcher(self._compiled(schema).deep_copy(), self._texts, self._end_bits)

    def _compile(self, schema: Schema) -> Any:
        library = self._library.LLMatcher
        try:
            if schema.kind == "json":
                grammar = library.grammar_from_json_schema(schema.text, overrides=_JSON_OPTIONS)
            elif schema.kind == "regex":
                grammar = library.grammar_from_regex(schema.text)
            else:
                choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in schema.value)
                grammar = library.grammar_from_lark(f"start: {choices}")
            limits = self._library.LLParserLimits(verbose_errors=False, max_grammar_size=_MOST_SYMBOLS)
            compiled = library(self._tokenizer, grammar, log_level=0, limits=limits)
            Matcher(compiled, self._texts, self._end_bits).allowed()
        except ValueError as error:
            name = {"json": "JSON schema", "regex": "regular expression", "choices": "list of choices"}[schema.kind]
            raise ValueError(f"the {name} is not supported: {error}") from error
        compiled.reset()
        return compiled


class Matcher:
    """The state of one answer in its grammar.

    Attributes:
        complete: whether the answer is complete and nothing can follow.
    """

    def __init__(self, matcher: Any, texts: "np.ndarray[Any, Any]", ends: "np.ndarray[Any, Any]") -> None:
        self._matcher, self._texts, self._ends = matcher, texts, ends
        self.complete = False

    def allowed(self) -> "np.ndarray[Any, Any]":
        """Return a bit for each token that may come next: end tokens if the answer is complete, and text.

        The bits are bytes, (vocabulary / 8 rounded up,), the lowest bit of a byte first.

        Raises:
            ValueError: the grammar has become too complex, or nothing can follow.
        """
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)[: len(self._texts)] & self._texts
        self._raise_error()
        if self._matcher.is_accepting():
            allowed |= self._ends
        if not allowed.any():
            raise ValueError("no token of the model can continue the answer.")
        return allowed

    def take(self, token: int) -> None:
        """Take the next token, which is not an end token.

        Raises:
            ValueError: the token is not allowed.
        """
        self._matcher.consume_token(token)
        self._raise_error()
        self.complete = self._matcher.is_stopped()

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            raise ValueError(_reason(self._matcher.get_error()))


def _packed(size: int, tokens: Collection[int]) -> "np.ndarray[Any, Any]":
    """Return `size` bits, as bytes, that are set for some tokens."""
    chosen = np.zeros(size, bool)
    chosen[list(tokens)] = True
    return np.packbits(chosen, bitorder="little")


def _reason(error: str) -> str:
    """Return llguidance's message on one line, without its own marks."""
    text = " ".join(error.replace("<non-verbose/>", "").split())
    return "no text follows it." if text.startswith("NoExtension") else f"{text.rstrip('.')}."
