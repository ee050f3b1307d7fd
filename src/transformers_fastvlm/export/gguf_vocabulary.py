# SPDX-License-Identifier: Apache-2.0
"""A tokenizer's vocabulary in GGUF's form, so that llama.cpp's own programs can read and write text.

This package passes token ids, so its answers do not depend on it. llama.cpp tokenizes like the original with two
exceptions: it does not normalize text to NFC, as Qwen2's tokenizer does, and a SentencePiece vocabulary prefixes a
space after each special token, not only at the start.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from .onnx_files import javascript_template

__all__ = ["Vocabulary", "plain_template", "read_vocabulary"]

# Pre-tokenizers are known to llama.cpp by name. This is the expression of Qwen2 and Qwen2.5.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF stores about a tokenizer.

    Attributes:
        model: "gpt2" for BPE on bytes, "llama" for SentencePiece's BPE, "none" for any other: ids only.
        pre: llama.cpp's name of the pre-tokenizer, for "gpt2".
        tokens: one for each row of the embeddings.
        types: their kinds, as in `gguf.TokenType`.
        scores: for "llama", of the tokens; the highest is merged first.
        merges: for "gpt2", pairs with a space between, the first is merged first.
    """

    model: str
    pre: str | None = None
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()


def plain_template(text_model_type: str) -> str:
    """Return the chat template of a text model for other programs: the same, without the marks for training."""
    return re.sub(r"\{%-\s*(?:end)?generation\s*-%\}\n?", "", javascript_template(text_model_type))


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Return a tokenizer's vocabulary.

    Args:
        tokenizer: one of the `tokenizers` library, as Transformers loads it.
        rows: of the embeddings. Ids without a row, such as that of an added `<image>`, are left out. Rows without a
            token become unused tokens.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    content = backend["model"]
    if content.get("type") != "BPE":
        return Vocabulary("none")
    tokens, types = _tokens(tokenizer, content, rows)
    if content.get("byte_fallback"):
        return Vocabulary("llama", tokens=tokens, types=types, scores=_scores(content, rows))
    merges = tuple(" ".join(pair) for pair in _pairs(content))
    pre = "qwen2" if _QWEN2 in _expressions(backend.get("pre_tokenizer")) else "default"
    return Vocabulary("gpt2", pre=pre, tokens=tokens, types=types, merges=merges)


def _tokens(tokenizer: Any, content: dict[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    from gguf import TokenType

    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, row in content["vocab"].items():
        if row < rows:
            tokens[row] = token
            is_byte = content.get("byte_fallback") and _BYTE.fullmatch(token)
            types[row] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for row, added in tokenizer.added_tokens_decoder.items():
        if row < rows:
            tokens[row] = added.content
            types[row] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    if content.get("byte_fallback") and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
    return tuple(tokens), tuple(types)


def _pairs(content: dict[str, Any]) -> list[list[str]]:
    """Return the merges as pairs; older files have texts with a space between."""
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in content["merges"]]


def _scores(content: dict[str, Any], rows: int) -> tuple[float, ...]:
    """Return scores that order merged tokens as the first merge that makes each."""
    vocabulary, scores = content["vocab"], [0.0] * rows
    for rank, pair in reversed(list(enumerate(_pairs(content), start=1))):
        row = vocabulary.get("".join(pair), rows)
        if row < rows:
            scores[row] = -float(rank)
    return tuple(scores)


def _expressions(content: Any) -> list[str]:
    """Return the regular expressions of a pre-tokenizer."""
    if isinstance(content, dict):
        own = [content["Regex"]] if isinstance(content.get("Regex"), str) else []
        return own + [found for value in content.values() for found in _expressions(value)]
    return [found for value in content for found in _expressions(value)] if isinstance(content, list) else []
