# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals of means by the bootstrap: B. Efron, Annals of Statistics 7, 1979; percentile intervals."""

import zlib
from collections.abc import Sequence

import numpy as np

__all__ = ["CONFIDENCE", "RESAMPLES", "SEED", "interval", "resampled_means"]

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0
_CELLS = 4_000_000
"""Upper limit of the counts drawn at a time; it bounds the memory."""


def resampled_means(
    values: Sequence[float], name: str = "", resamples: int = RESAMPLES, seed: int = SEED
) -> np.ndarray:
    """Return the bootstrap means of `values`, (resamples,).

    Each resample draws `len(values)` values with replacement. The counts of the distinct values are drawn from a
    multinomial distribution. Scores have few distinct values, so this is fast even for a hundred thousand of them.

    Args:
        values: one or more.
        name: of the task. Tasks with different names get independent resamples from the same seed.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("there are no values to resample; expected one or more.")
    different, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    total = int(counts.sum())
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    step = max(1, _CELLS // len(different))
    parts = [
        generator.multinomial(total, counts / total, size=min(step, resamples - start)) @ different
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts) / total


def interval(means: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentile interval of resampled means."""
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
