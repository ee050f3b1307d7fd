# SPDX-License-Identifier: Apache-2.0
"""Plan batches in a fixed order, so that a resumed run knows which are finished."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice

from ..data.sample_errors import shortened
from ..storage.journal_file import JournalError
from .batch_journal import BatchJournal
from .batch_rows import counted
from .requests import Request

__all__ = ["Batch", "plan", "unfinished"]

_WINDOW = 512

Batch = list[tuple[int, Request]]
"""Requests with their row numbers in the output."""


def plan(requests: Iterable[Request], batch_size: int) -> Iterator[Batch]:
    """Yield batches of numbered requests with questions of similar length, deterministically.

    Requests are sorted within windows of 512 (or one batch, if that is more), the longest question first.
    """
    numbered = enumerate(requests)
    window_size = max(1, _WINDOW // batch_size) * batch_size
    while window := list(islice(numbered, window_size)):
        window.sort(key=lambda item: -len((item[1].question or "").encode(errors="replace")))
        for start in range(0, len(window), batch_size):
            yield window[start : start + batch_size]


def unfinished(batches: Iterator[Batch], journal: BatchJournal) -> Iterator[Batch]:
    """Return the batches of a plan without their finished rows; all earlier rows that are left become one batch.

    Raises:
        JournalError: one of the finished rows' images has changed, or the plan lacks one of these rows.
    """
    left: dict[int, Request] = {}
    for index, before in journal.states():
        while index not in left:
            if (batch := next(batches, None)) is None:
                raise JournalError(
                    f"{journal.path} has row {index}, but the inputs do not; start again with --restart."
                )
            left.update(batch)
        request = left.pop(index)
        if request.file_state() != before:
            raise JournalError(
                f"{shortened(request.file)} has changed since it was answered, so old and new answers would mix. "
                f"Restore the file, or start again with --restart, which discards {counted(journal.rows, 'row')}."
            )
    return chain([list(left.items())], batches) if left else batches
