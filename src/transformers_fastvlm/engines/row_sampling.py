# SPDX-License-Identifier: Apache-2.0
"""Choose the next token of each row by the row's own options and state, independent of the other rows."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from .base import Sampling
from .grammars import Matcher

__all__ = ["RowChooser", "RowSampling", "choose_tokens"]


class RowChooser:
    """Chooses the tokens of one answer. It does not know its batch, so rows can join and leave at any step.

    Args:
        sampling: the row's options.
        matcher: enforces `sampling.schema`; None for free text.
        ends: tokens that end an answer.

    Attributes:
        sampling: as above.
        generator: the row's random numbers, None for greedy decoding. PyTorch's global random state is neither used
            nor changed.
        ended: whether the row has ended. It then draws no numbers and takes no tokens; an engine sets it when an
            answer ends for a reason that the chooser does not know, such as its length.
        complete: whether the answer is complete by its schema, and nothing can follow. The row has ended then.
        error: why no token could be chosen for this row; the row has ended then, and others continue.
        logprobs: logprob of the last token, and the most probable tokens with theirs; None if not asked for.
    """

    def __init__(self, sampling: Sampling, matcher: Matcher | None = None, ends: Collection[int] = ()) -> None:
        self.sampling, self.matcher, self._ends = sampling, matcher, ends
        self.generator: torch.Generator | None = None
        if not sampling.greedy:
            self.generator = torch.Generator()
            self.generator.seed() if sampling.seed is None else self.generator.manual_seed(sampling.seed)
        self.ended = self.complete = False
        self.error: Exception | None = None
        self.logprobs: tuple[float, list[tuple[int, float]]] | None = None
        self._added = dict(sampling.logit_bias)
        self._taken: set[int] = set()
        self._plain = sampling.greedy and not sampling.changes_scores

    @property
    def draws(self) -> bool:
        """Whether the next token is sampled."""
        return self.generator is not None and not self.ended

    @property
    def plain(self) -> bool:
        """Whether the next token is simply the one with the highest score, and nothing else is asked for."""
        return self._plain or self.ended

    @property
    def changes(self) -> bool:
        """Whether biases, penalties or a schema change the row's scores."""
        return not self.ended and (self.matcher is not None or bool(self._added))

    def add(self, scores: Tensor) -> None:
        """Add biases and penalties to the row's scores (vocabulary,) in place."""
        if self._added:
            tokens = torch.tensor(list(self._added), device=scores.device)
            scores[tokens] += torch.tensor(list(self._added.values()), dtype=scores.dtype, device=scores.device)

    def allowed(self) -> Any:
        """Return the bits of the tokens that the schema allows, see `Matcher`; None without one, or if it fails."""
        try:
            return None if self.matcher is None else self.matcher.allowed()
        except ValueError as error:
            self._fail(error)
            return None

    def take(self, token: int) -> None:
        """Take the token that was chosen for this row."""
        sampling = self.sampling
        if sampling.presence_penalty or sampling.frequency_penalty:
            before = 0.0 if token in self._taken else sampling.presence_penalty
            self._added[token] = self._added.get(token, 0.0) - before - sampling.frequency_penalty
            self._taken.add(token)
        if token in self._ends:
            self.ended = True
        elif self.matcher is not None:
            try:
                self.matcher.take(token)
            except ValueError as error:
                self._fail(error)
            else:
                self.complete = self.matcher.complete
                self.ended = self.ended or self.complete

    def _fail(self, error: ValueError) -> None:
        self.error, self.ended = ValueError(f"the answer cannot follow its schema: {error}"), True


def choose_tokens(choosers: Sequence[RowChooser], scores: Tensor) -> list[int]:
    """Return the next token of each row; each chooser has taken its own.

    A row's tokens do not depend on the other rows. A row that has ended gets a token without meaning. A row that
    fails has its chooser's `error` set.

    Args:
        choosers: one of each row.
        scores: the model's logits (rows, vocabulary); not changed.
    """
    raw = scores
    changing = [row for row, chooser in enumerate(choosers) if chooser.changes]
    if changing:
        scores = raw.float() if raw.dtype != torch.float32 else raw.clone()
        for row in changing:
            choosers[row].add(scores[row])
        _hold(choosers, changing, scores)
    tokens = scores.argmax(-1)
    drawing = [row for row, chooser in enumerate(choosers) if chooser.draws]
    if drawing:
        tokens[drawing] = _draw([choosers[row] for row in drawing], scores[drawing].float())
    _note_logprobs(choosers, raw, tokens)
    chosen: list[int] = tokens.tolist()
    for chooser, token in zip(choosers, chosen, strict=True):
        if not chooser.ended:
            chooser.take(token)
    return chosen


def _hold(choosers: Sequence[RowChooser], rows: list[int], scores: Tensor) -> None:
    """Leave some rows of `scores` (rows, vocabulary) only the tokens that their schemas allow, in place."""
    bits = {row: allowed for row in rows if (allowed := choosers[row].allowed()) is not None}
    if not bits:
        return
    size = scores.shape[-1]
    allowed = torch.from_numpy(np.unpackbits(np.stack([*bits.values()]), axis=-1, count=size, bitorder="little"))
    forbidden = allowed.to(scores.device) == 0
    if len(bits) == len(scores):
        scores.masked_fill_(forbidden, -torch.inf)
    else:
        scores[list(bits)] = scores[list(bits)].masked_fill(forbidden, -torch.inf)


def _note_logprobs(choosers: Sequence[RowChooser], scores: Tensor, tokens: Tensor) -> None:
    """Give the choosers that ask for it the logprobs of the chosen `tokens` (rows,) and of the most probable ones."""
    rows = [row for row, chooser in enumerate(choosers) if not chooser.ended and chooser.sampling.logprobs is not None]
    if not rows:
        return
    logprobs = scores[rows].float().log_softmax(-1)
    of_chosen = logprobs.gather(-1, tokens[rows][:, None])[:, 0].tolist()
    numbers = [choosers[row].sampling.logprobs or 0 for row in rows]
    values, ids = logprobs.topk(min(max(numbers), logprobs.shape[-1]))
    for row, own, number, top, top_ids in zip(rows, of_chosen, numbers, values.tolist(), ids.tolist(), strict=True):
        choosers[row].logprobs = own, list(zip(top_ids[:number], top[:number], strict=True))


def _draw(choosers: list[RowChooser], logits: Tensor) -> Tensor:
    """Return sampled tokens (rows,) for logits (rows, vocabulary)."""
    device = logits.device
    temperature = torch.tensor([[one.sampling.temperature] for one in choosers]).to(device)
    top_p = torch.tensor([[one.sampling.top_p] for one in choosers]).to(device)
    numbers = torch.stack([torch.rand(1, generator=one.generator) for one in choosers]).to(device)
    probabilities = (logits / temperature).softmax(-1)
    probabilities, tokens = probabilities.sort(descending=True, stable=True)
    reached = probabilities.cumsum(-1)
    kept = reached - probabilities < top_p  # the smallest set that reaches top_p
    last = kept.sum(-1, keepdim=True).clamp(min=1) - 1
    place = torch.searchsorted(reached, numbers * reached.gather(-1, last), right=True)
    return tokens.gather(-1, torch.minimum(place, last))[:, 0]


class RowSampling(LogitsProcessor):
    """The choosers' tokens in `generate()`: a logits processor for greedy decoding.

    It leaves a finite score only for the chosen token, unless the highest score decides for all rows.

    Args:
        choosers: one of each row.
    """

    def __init__(self, choosers: Sequence[RowChooser]) -> None:
        self.choosers = choosers

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return scores (rows, vocabulary) with the maximum at the chosen token."""
        if all(chooser.plain for chooser in self.choosers):
            return scores
        tokens = torch.tensor(choose_tokens(self.choosers, scores), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)
