# SPDX-License-Identifier: Apache-2.0
"""Decode tokens incrementally: only complete characters, and no text from a stop string onwards."""

from collections.abc import Sequence
from typing import Any

__all__ = ["AnswerText"]

_INCOMPLETE = "\ufffd"
"""Replacement character that tokenizers write for incomplete UTF-8 sequences."""


class AnswerText:
    """The text of an answer, in parts; the joined parts equal the text of decoding all tokens at once.

    Surrounding white space is removed: many models write a space before the first word. Transformers' streamers hold
    back whole words, do not support stop strings, and take only one row.

    Args:
        tokenizer: decodes tokens; special ones are left out.
        stops: stop strings; they are not part of the answer.
        continues: the answer continues a text, so white space before its first word is kept.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, continues: bool = False) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        # Tokens up to `_said` are decoded. Decoding starts a little earlier, at `_start`: some tokenizers decode the
        # first token of a sequence differently.
        self._start = self._said = 0
        self._begun = continues
        self._blank = ""  # white space that is part of the answer if more text follows
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """Take the next token; return the text that is now certain, often none."""
        self._tokens.append(token)
        piece = self._next()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._start, self._said = self._said, len(self._tokens)
        return self._trim(self._release(piece))

    def finish(self) -> str:
        """Return the remaining text at the end of the answer."""
        piece = self._release("" if self.stopped else self._next())
        rest, self._held = self._held, ""
        return self._trim(piece + rest)

    def _trim(self, piece: str) -> str:
        if not self._begun:
            piece = piece.lstrip()
            self._begun = bool(piece)
        piece = self._blank + piece
        text = piece.rstrip()
        self._blank = piece[len(text) :]
        return text

    def _next(self) -> str:
        parts = (self._tokens[self._start : end] for end in (self._said, None))
        before, after = (str(self._tokenizer.decode(part, skip_special_tokens=True)) for part in parts)
        return after[len(before) :]

    def _release(self, piece: str) -> str:
        """Return the part of the held text and `piece` that cannot belong to a stop string."""
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max(
            (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]
