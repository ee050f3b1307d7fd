# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss of CLIP, and how well vectors find their counterparts.

Sources: CLIP, Radford et al. 2021, arXiv 2103.00020, section 2.3 and figure 3; InfoNCE, van den Oord et al. 2018,
arXiv 1807.03748, equation 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["contrastive_loss", "recall"]


def contrastive_loss(first: Tensor, second: Tensor, scale: Tensor | float, groups: Tensor | None = None) -> Tensor:
    """Return the symmetric cross entropy of finding each row's counterpart among all rows of the batch.

    Args:
        first: (batch, dimension), normalized vectors, such as of texts.
        second: (batch, dimension), their counterparts in the same order, such as of images.
        scale: factor of the cosines, the inverse of the temperature: a number, or a parameter that is trained.
        groups: (batch,), an integer for each row; rows of the same group are not negatives. None: all other rows are.

    Returns:
        A scalar: the mean of both directions.

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"the vectors are {tuple(first.shape)} and {tuple(second.shape)}; expected two equal shapes.")
    scores = scale * first @ second.T
    rows = torch.arange(len(scores), device=scores.device)
    if groups is not None:
        alike = (groups[:, None] == groups[None]) & (rows[:, None] != rows[None])
        scores = scores.masked_fill(alike, torch.finfo(scores.dtype).min)
    return (functional.cross_entropy(scores, rows) + functional.cross_entropy(scores.T, rows)) / 2


def recall(queries: Tensor, documents: Tensor, ranks: Sequence[int] = (1, 10)) -> dict[int, float]:
    """Return recall at k: how often the right document is among the k best ones.

    Args:
        queries: (number, dimension), normalized vectors; document i is the right one for query i.
        documents: (number, dimension), normalized vectors.
        ranks: the values of k.

    Returns:
        The share of queries, 0 to 1, by k. A document with the same score as the right one counts as better.
    """
    scores = torch.as_tensor(queries) @ torch.as_tensor(documents).T
    before = (scores >= scores.diagonal()[:, None]).sum(1) - 1
    return {rank: float((before < rank).float().mean()) for rank in ranks}
