# SPDX-License-Identifier: Apache-2.0
"""From tokens to text as they come: whole characters only, and nothing from a stop text on."""

from collections.abc import Sequence
from typing import Any

__all__ = ["AnswerText"]

_INCOMPLETE = "\ufffd"
"""What a tokenizer writes for a character of which only some bytes are there."""


class AnswerText:
    """The text of an answer, piece by piece; the pieces together are what decoding all tokens at once gives.

    White space around it is left out: many models write a blank before their first word. Transformers' own streamers
    hold back whole words, know no stop texts, and take one row.

    Args:
        tokenizer: decodes tokens; special ones are left out.
        stops: texts at which the answer ends; they are not part of it.

    Attributes:
        stopped: whether a stop text was found.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        # Tokens up to `_said` are text already. Decoding begins a little earlier, at `_start`: some tokenizers treat
        # the first token otherwise than those that follow.
        self._start = self._said = 0
        self._begun = False
        self._blank = ""  # white space that is part of the answer if more follows
        self._held = ""  # text that may be the beginning of a stop text
        self.stopped = False

    def add(self, token: int) -> str:
        """Take the next token; return what is now certain to be part of the answer, often nothing."""
        self._tokens.append(token)
        piece = self._next()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._start, self._said = self._said, len(self._tokens)
        return self._trim(self._release(piece))

    def finish(self) -> str:
        """Return what is left at the end of the answer."""
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
        """Return what of the held text and `piece` cannot belong to a stop text."""
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
