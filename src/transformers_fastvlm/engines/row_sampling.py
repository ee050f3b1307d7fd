# SPDX-License-Identifier: Apache-2.0
"""Choose the next token of each row by the row's own options and state, whatever other rows run beside it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .base import Sampling

__all__ = ["RowChooser", "RowSampling", "choose_tokens"]


class RowChooser:
    """Chooses the tokens of one answer. It does not know its batch, so rows can join and leave at any step.

    Args:
        sampling: the row's options.

    Attributes:
        sampling: as above.
        generator: the row's random numbers, None for greedy decoding. PyTorch's global random state is neither used
            nor changed.
        ended: whether the row has ended. It then draws no numbers and takes no tokens; an engine sets it when an
            answer ends for another reason than its last token.
        error: why no token could be chosen for this row; the row has ended then, and others continue.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator: torch.Generator | None = None
        if not sampling.greedy:
            self.generator = torch.Generator()
            self.generator.seed() if sampling.seed is None else self.generator.manual_seed(sampling.seed)
        self.ended = False
        self.error: Exception | None = None

    @property
    def draws(self) -> bool:
        """Whether the next token is sampled."""
        return self.generator is not None and not self.ended

    @property
    def plain(self) -> bool:
        """Whether the next token is simply the one with the highest score."""
        return not self.draws

    def take(self, token: int) -> None:
        """Take the token that was chosen for this row."""


def choose_tokens(choosers: Sequence[RowChooser], scores: Tensor) -> list[int]:
    """Return the next token of each row; each chooser has taken its own.

    A row's tokens do not depend on the other rows. A row that has ended gets a token that means nothing. A row that
    fails has its chooser's `error` set.

    Args:
        choosers: one of each row.
        scores: the model's logits (rows, vocabulary); not changed.
    """
    tokens = scores.argmax(-1)
    drawing = [row for row, chooser in enumerate(choosers) if chooser.draws]
    if drawing:
        tokens[drawing] = _draw([choosers[row] for row in drawing], scores[drawing].float())
    chosen: list[int] = tokens.tolist()
    for chooser, token in zip(choosers, chosen, strict=True):
        if not chooser.ended:
            chooser.take(token)
    return chosen


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
