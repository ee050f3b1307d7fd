# SPDX-License-Identifier: Apache-2.0
"""Open the next images in a thread, while the model is busy with those before."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["opened_one_ahead"]

Batch = TypeVar("Batch")
Opened = TypeVar("Opened")


def opened_one_ahead(open_batch: Callable[[Batch], Opened], batches: Iterable[Batch]) -> Generator[Opened]:
    """Yield `open_batch(batch)` for each batch; a thread opens the next one, and no more, in the meantime."""
    with ThreadPoolExecutor(1, "fastvlm-images") as thread:
        waiting: Future[Opened] | None = None
        for batch in batches:
            ready, waiting = waiting, thread.submit(open_batch, batch)
            if ready is not None:
                yield ready.result()
        if waiting is not None:
            yield waiting.result()
