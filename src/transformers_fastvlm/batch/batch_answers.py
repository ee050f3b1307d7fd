# SPDX-License-Identifier: Apache-2.0
"""From opened requests to rows: the engine is asked about a batch, and about each alone where it refuses one."""

from collections.abc import Sequence
from typing import Any

from ..engines.base import Answer, Conversation, Engine, Sampling
from .batch_rows import row_of
from .opening import Opened

__all__ = ["answer"]


def answer(batch: Sequence[Opened], engine: Engine, sampling: Sampling) -> list[dict[str, Any]]:
    """Return the row of each request of a batch, with its number as `index`."""
    asked = [one.conversation for one in batch if one.conversation is not None]
    results = iter(_generate(engine, asked, sampling))
    rows = []
    for one in batch:
        result = one.error if one.conversation is None else next(results)
        answered, error = (result, None) if isinstance(result, Answer) else (None, result)
        rows.append({"index": one.index, **row_of(one.request, answered, error)})
    return rows


def _generate(engine: Engine, conversations: Sequence[Conversation], sampling: Sampling) -> list[Answer | str]:
    """Return the answer to each conversation, or why it is refused."""
    if not conversations:
        return []
    try:
        return list(engine.generate(conversations, sampling))
    except ValueError as error:
        if len(conversations) == 1:
            return [str(error)]
    return [result for conversation in conversations for result in _generate(engine, [conversation], sampling)]
