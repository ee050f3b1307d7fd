# SPDX-License-Identifier: Apache-2.0
"""From opened requests to rows: the engine is asked about a batch, and about each alone where it refuses one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..engines.base import MAX_SEED, Answer, Conversation, Sampling
from ..engines.engine import Engine
from .batch_rows import row_of
from .opening import Opened

__all__ = ["answer"]


def answer(batch: Sequence[Opened], engine: Engine, sampling: Sampling) -> list[dict[str, Any]]:
    """Return the row of each request of a batch, with its number as `index`, which is added to the seed."""
    asked = [(one.conversation, _of_row(sampling, one.index)) for one in batch if one.conversation is not None]
    results = iter(_generate(engine, asked))
    rows = []
    for one in batch:
        result = one.error if one.conversation is None else next(results)
        answered, error = (result, None) if isinstance(result, Answer) else (None, result)
        rows.append({"index": one.index, **row_of(one.request, answered, error)})
    return rows


def _generate(engine: Engine, asked: Sequence[tuple[Conversation, Sampling]]) -> list[Answer | str]:
    """Return the answer to each conversation, or why it is refused."""
    if not asked:
        return []
    try:
        return list(engine.generate([conversation for conversation, _ in asked], [sampling for _, sampling in asked]))
    except ValueError as error:
        if len(asked) == 1:
            return [str(error)]
    return [result for one in asked for result in _generate(engine, [one])]


def _of_row(sampling: Sampling, index: int) -> Sampling:
    if sampling.seed is None:
        return sampling
    return dataclasses.replace(sampling, seed=(sampling.seed + index) % (MAX_SEED + 1))
