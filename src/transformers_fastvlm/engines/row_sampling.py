# SPDX-License-Identifier: Apache-2.0
"""Sample the next token of each row with the row's temperature, top_p and random generator."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .base import Sampling

__all__ = ["RowSampling"]


class RowSampling(LogitsProcessor):
    """Samples tokens such that each row depends only on its seed, not on the rest of the batch.

    It is a logits processor for greedy decoding that leaves a finite score only for the sampled token. Each row has a
    random generator; PyTorch's global random state is neither used nor changed.

    Args:
        samplings: options of each row.
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self.rows = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
        sampled = [samplings[row] for row in self.rows]
        self._temperature = torch.tensor([[one.temperature] for one in sampled])
        self._top_p = torch.tensor([[one.top_p] for one in sampled])
        self._generators = [torch.Generator() for _ in sampled]
        for generator, one in zip(self._generators, sampled, strict=True):
            generator.seed() if one.seed is None else generator.manual_seed(one.seed)

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return scores (rows, vocabulary) with the maximum at the chosen token."""
        if not self.rows:
            return scores
        logits = scores[self.rows].float()
        chosen = torch.full_like(logits, -torch.inf).scatter_(-1, self._draw(logits), 0.0)
        scores = scores.clone()
        scores[self.rows] = chosen.to(scores.dtype)
        return scores

    def _draw(self, logits: Tensor) -> Tensor:
        """Return sampled tokens (rows, 1) for logits (rows, vocabulary)."""
        device = logits.device
        probabilities = (logits / self._temperature.to(device)).softmax(-1)
        probabilities, tokens = probabilities.sort(descending=True, stable=True)
        reached = probabilities.cumsum(-1)
        kept = reached - probabilities < self._top_p.to(device)  # the smallest set that reaches top_p
        last = kept.sum(-1, keepdim=True).clamp(min=1) - 1
        numbers = torch.stack([torch.rand(1, generator=generator) for generator in self._generators]).to(device)
        place = torch.searchsorted(reached, numbers * reached.gather(-1, last), right=True)
        return tokens.gather(-1, torch.minimum(place, last))
