# SPDX-License-Identifier: Apache-2.0
"""Threads for work that cannot be interrupted, such as decoding an image; the end of the process does not wait."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

__all__ = ["DaemonThreads"]


class DaemonThreads(Executor):
    """A few threads with a queue of work.

    At the end of the process, Python waits for the threads of ThreadPoolExecutor, but not for these.

    Args:
        count: number of threads; they start with the first call.
        name: name of the threads; a number is appended.
    """

    def __init__(self, count: int, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}_{index}", daemon=True) for index in range(count)
        ]
        self._starting = threading.Lock()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a function call for the next free thread."""
        with self._starting:
            for thread in self._threads:
                if thread.ident is None:
                    thread.start()
        future: Future[Any] = Future()
        self._queue.put((future, lambda: function(*args, **kwargs)))
        return future

    def close(self, seconds: float | None) -> None:
        """Drop waiting work, end the threads, and wait for running ones: for some seconds, or until they end."""
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
            del task, future, call  # do not keep them alive while this thread waits
