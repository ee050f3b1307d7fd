# SPDX-License-Identifier: Apache-2.0
"""Threads for work that cannot be interrupted, such as decoding an image, and that nothing has to wait for."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

__all__ = ["DaemonThreads"]


class DaemonThreads(Executor):
    """A few threads that work off a queue.

    Python waits for those of ThreadPoolExecutor at the end of the process, however long that takes; for these it does
    not.

    Args:
        count: threads; they begin with the first piece of work.
        name: of each, with a number after it.
    """

    def __init__(self, count: int, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}_{index}", daemon=True) for index in range(count)
        ]
        self._starting = threading.Lock()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a function called by the next thread that is free."""
        with self._starting:
            for thread in self._threads:
                if thread.ident is None:
                    thread.start()
        future: Future[Any] = Future()
        self._queue.put((future, lambda: function(*args, **kwargs)))
        return future

    def close(self, seconds: float | None) -> None:
        """Leave what waits undone, end the threads, and wait for those at work: so long, or to their end."""
        while not self._queue.empty():
            if (task := self._queue.get()) is not None:
                task[0].cancel()
        for _ in self._threads:
            self._queue.put(None)
        end = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(None if end is None else max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            future, call = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del task, future, call  # nothing of it is kept while this thread waits
