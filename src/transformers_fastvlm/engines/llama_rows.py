# SPDX-License-Identifier: Apache-2.0
"""Requests that join and leave at any token, each a sequence of llama.cpp."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..generation_fastvlm import check_scores
from ..inference.image_table import FIRST_ID, ImageTable
from .llama_library import LlamaContext
from .request import Request
from .row_sampling import RowChooser, choose_tokens

__all__ = ["KEPT_SEQUENCES", "STEP_TOKENS", "LlamaRows"]

STEP_TOKENS = 512
"""Maximum tokens of a step. A longer prompt takes several steps, between which the other rows get their tokens."""

KEPT_SEQUENCES = 8
"""Number of sequences kept after their answers, so that prompts with the same beginning can share it."""

KEPT_TOKENS = 2048
"""Their maximum tokens together, unless a single one has more: each step attends to all tokens of the cache."""


class _Row:
    """A request with a sequence.

    Attributes:
        request: as above.
        ids: tokens of its prompt, and of its answer so far; those of images are ids of `ImageTable`.
        sequence: number of the sequence.
        done: number of `ids` whose keys and values are in the cache.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.ids: list[int] = list(request.prompt.inputs["ids"])
        self.sequence, self.done = -1, 0

    def end_of_run(self, start: int, of_image: bool, most: int) -> int:
        """Return the end of a run of image tokens or of text tokens from `start`, at most `most` long."""
        end = start
        while end < len(self.ids) and end - start < most and (self.ids[end] >= FIRST_ID) == of_image:
            end += 1
        return end

    def features(self, start: int, end: int) -> "np.ndarray[Any, Any]":
        """Return the features (tokens, hidden_size) of image tokens."""
        ids, found = np.array(self.ids[start:end]), None
        for image in self.request.prompt.inputs["images"]:
            own = (ids >= image.ids.start) & (ids < image.ids.stop)
            if own.any():
                features = image.features.numpy()
                found = np.empty((len(ids), features.shape[-1]), np.float32) if found is None else found
                found[own] = features[ids[own] - image.ids.start]
        if found is None:
            raise RuntimeError("a prompt has an image that is not encoded.")
        return found


@dataclass(frozen=True)
class _Piece:
    """Neighbouring tokens of a row, from `start` to before `end`, all of text or all of images."""

    row: _Row
    start: int
    end: int


class LlamaRows:
    """The running requests of a model, each a row that gets its next token in each step; see `Rows`.

    Prompts that begin with the same tokens and images share the cache of this beginning, also with a few rows that
    have left. If the cache is full, the youngest row gives up its sequence, and is computed again when another leaves.

    Args:
        open_context: opens a context with a cache for a number of tokens, for `rows` + `KEPT_SEQUENCES` sequences.
        images: the model's images.
        rows: maximum number of rows.
        tokens: capacity of the cache in tokens.
        placeholder: token that is never chosen.

    Attributes:
        tokens: as above.
    """

    def __init__(
        self,
        open_context: Callable[[int], LlamaContext],
        images: ImageTable,
        *,
        rows: int,
        tokens: int,
        placeholder: int,
    ) -> None:
        self.tokens = tokens
        self._open_context, self._images, self._most, self._placeholder = open_context, images, rows, placeholder
        self._context = open_context(tokens)
        self._reset()

    def _reset(self) -> None:
        self._round = self._images.rounds
        self._rows: dict[Request, _Row] = {}
        self._paused: dict[Request, _Row] = {}  # without a sequence
        self._may_resume = False
        self._kept: OrderedDict[int, list[int]] = OrderedDict()  # tokens in the cache, by sequence
        self._free = list(range(self._most + KEPT_SEQUENCES))

    @property
    def running(self) -> list[Request]:
        """Requests that have a row."""
        return [*self._rows, *self._paused]

    @property
    def full(self) -> bool:
        """Whether every row is taken, or one waits because the cache is full."""
        return bool(self._paused) or len(self._rows) == self._most

    @property
    def stale(self) -> bool:
        """Whether the cache may hold another image under the ids of a new one; `clear` drops it."""
        return self._round != self._images.rounds

    def add(self, request: Request) -> None:
        """Give a request a row; its images must be encoded."""
        row = _Row(request)
        self._begin(row)
        request.cached_tokens = row.done

    def remove(self, request: Request) -> None:
        """Take a request's row away, and free its sequence."""
        if self._paused.pop(request, None) is None:
            self._empty(self._rows.pop(request).sequence)
            self._may_resume = True

    def step(self) -> list[Request]:
        """Run one step of the model. Each row whose prompt is complete gets its next token.

        Returns:
            The requests that have ended or failed. They have no row any more.

        Raises:
            Exception: the step failed, and with it all rows: call `clear`.
        """
        if self._paused and (self._may_resume or not self._rows):
            request = next(iter(self._paused))
            self._begin(self._paused.pop(request))
            self._may_resume = False
        texts, images = self._plan()
        return [*self._compute(texts, of_images=False), *self._compute(images, of_images=True)]

    def clear(self) -> list[Request]:
        """Take all rows away and drop the cache; return the requests that had a row."""
        left = self.running
        self._context.clear()
        self._reset()
        return left

    def grow(self, tokens: int) -> None:
        """Open a cache for more tokens; no row may be running.

        Raises:
            LlamaError: there is not enough memory; the cache is as before.
        """
        self._context.close()
        self._reset()
        try:
            self._context = self._open_context(tokens)
            self.tokens = tokens
        except Exception:
            self._context = self._open_context(self.tokens)
            raise

    def close(self) -> None:
        """Free the memory."""
        self._reset()
        self._context.close()

    # Sequences

    def _begin(self, row: _Row) -> None:
        """Give a row a sequence, which shares the longest beginning that another has. The last token is computed."""
        source, shared = -1, 0
        others = [(one.sequence, one.ids[: one.done]) for one in self._rows.values()]
        for sequence, ids in (*self._kept.items(), *others):
            common = _common(ids, row.ids[:-1])
            if common > shared:
                source, shared = sequence, common
        row.sequence, row.done = self._free.pop(), shared
        if shared:
            self._context.copy(source, row.sequence, shared)
            if source in self._kept:
                self._kept.move_to_end(source)
        self._rows[row.request] = row

    def _empty(self, sequence: int) -> None:
        self._context.remove(sequence)
        self._free.append(sequence)

    def _keep(self, row: _Row) -> None:
        """Keep the sequence of a row that has ended, and of those before it only a few."""
        ids = row.ids[: row.done]
        for sequence, before in list(self._kept.items()):
            if before == ids[: len(before)]:
                self._forget(sequence)
        self._kept[row.sequence] = ids
        while len(self._kept) > KEPT_SEQUENCES or (
            len(self._kept) > 1 and sum(map(len, self._kept.values())) > KEPT_TOKENS
        ):
            self._forget(next(iter(self._kept)))

    def _forget(self, sequence: int) -> None:
        del self._kept[sequence]
        self._empty(sequence)

    def _free_tokens(self) -> None:
        """Free a part of the full cache: the sequence that was kept for the longest time, or that of the youngest row.

        Raises:
            RuntimeError: there is only one row.
        """
        if self._kept:
            self._forget(next(iter(self._kept)))
        elif len(self._rows) > 1:
            request, row = self._rows.popitem()
            self._empty(row.sequence)
            self._paused[request] = row
            self._may_resume = False
        else:
            raise RuntimeError(f"a row does not fit into the cache of {self.tokens} tokens.")

    # Steps

    def _plan(self) -> tuple[list[_Piece], list[_Piece]]:
        """Return the chunks of this step, of texts and of images: first those of answers, then prompts by their age.

        They are computed in this order, so a prompt can have a chunk of text and the image after it.
        """
        texts: list[_Piece] = []
        images: list[_Piece] = []
        left = min(STEP_TOKENS, self._context.rows)
        for row in sorted(self._rows.values(), key=lambda row: len(row.ids) - row.done > 1):
            start = row.done
            for pieces, of_image in ((texts, False), (images, True)):
                end = row.end_of_run(start, of_image, left)
                if end > start:
                    pieces.append(_Piece(row, start, end))
                    left -= end - start
                    start = end
        return texts, images

    def _compute(self, pieces: list[_Piece], of_images: bool) -> list[Request]:
        """Compute chunks; each row that is complete gets a token. Return the requests that have ended."""
        while pieces := [one for one in pieces if self._rows.get(one.row.request) is one.row]:
            if self._decode(pieces, of_images):
                break
            self._free_tokens()
        complete: list[tuple[_Row, int]] = []
        last = -1
        for piece in pieces:
            last += piece.end - piece.start
            piece.row.done = piece.end
            if piece.end == len(piece.row.ids):
                complete.append((piece.row, last))
        return self._take_tokens(complete)

    def _decode(self, pieces: Sequence[_Piece], of_images: bool) -> bool:
        lengths = [one.end - one.start for one in pieces]
        outputs = np.zeros(sum(lengths), bool)
        outputs[np.cumsum(lengths) - 1] = [one.end == len(one.row.ids) for one in pieces]
        sequences = np.repeat([one.row.sequence for one in pieces], lengths)
        positions = np.concatenate([np.arange(one.start, one.end) for one in pieces])
        if of_images:
            features = np.concatenate([one.row.features(one.start, one.end) for one in pieces])
            return self._context.decode(sequences, positions, outputs, embeddings=features)
        ids = np.array([token for one in pieces for token in one.row.ids[one.start : one.end]])
        return self._context.decode(sequences, positions, outputs, ids=ids)

    def _take_tokens(self, complete: list[tuple[_Row, int]]) -> list[Request]:
        """Choose the next token of rows, each with the place of its logits; return the requests that have ended."""
        if not complete:
            return []
        scores = torch.from_numpy(np.stack([self._context.logits(place) for _, place in complete]))
        if self._placeholder < scores.shape[-1]:
            scores[:, self._placeholder] = -torch.inf
        if not all(row.request.tokens for row, _ in complete):
            check_scores(scores[:, None])  # of all rows: attention spreads NaN from one row to the others
        tokens = choose_tokens([_chooser(row.request) for row, _ in complete], scores)
        ended = []
        for (row, _), token in zip(complete, tokens, strict=True):
            row.ids.append(token)
            if row.request.take(token):
                ended.append(row.request)
                del self._rows[row.request]
                self._keep(row)
                self._may_resume = True
        return ended


def _chooser(request: Request) -> RowChooser:
    if request.chooser is None:
        raise RuntimeError("a request has no token chooser.")
    return request.chooser


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of equal tokens at the beginning."""
    return next(
        (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )
