# SPDX-License-Identifier: Apache-2.0
"""Many requests, only some of them at a time: as soon as one ends, its answer is passed on and the next one starts."""

import contextlib
import functools
import math
from collections.abc import Callable, Generator, Iterable
from queue import Empty, SimpleQueue
from typing import TypeVar

from .base import Answer
from .request import PATIENCE, Request

__all__ = ["as_ended"]

Key = TypeVar("Key")


def as_ended(
    asked: Iterable[tuple[Key, Callable[[], Request]]], *rows: int | None
) -> Generator[list[tuple[Key, Answer | ValueError]]]:
    """Start requests and yield the answers in the order in which they end, so that a long one holds up no other.

    There are up to half as many requests more than rows, so that one is ready when a row becomes free. If an error ends
    the generator, or its user closes it, all running requests are cancelled.

    Args:
        asked: a key of any kind and a function that starts the request, such as `Engine.stream` with its arguments. The
            next one is read only when there is room for it.
        *rows: numbers of requests that are answered at the same time, such as the engine's; the smallest one counts.
            None for no limit.

    Yields:
        Keys and answers of the requests that have ended since; or the ValueError of one that was refused or failed.

    Raises:
        Exception: any other error of a request.
    """
    least = min((number for number in rows if number is not None), default=None)
    room = math.inf if least is None else least + (least + 1) // 2
    ended: SimpleQueue[int] = SimpleQueue()
    running: dict[int, tuple[Key, Request]] = {}
    try:
        for number, (key, start) in enumerate(asked):
            try:
                request = start()
            except ValueError as error:
                yield [(key, error)]
            else:
                running[number] = key, request
                request.when_done(functools.partial(ended.put, number))
            while len(running) >= room or not ended.empty():
                yield [_result(*running.pop(one)) for one in _all_of(ended)]
        while running:
            yield [_result(*running.pop(one)) for one in _all_of(ended)]
    finally:
        for _, request in running.values():
            request.cancel()


def _all_of(ended: "SimpleQueue[int]") -> list[int]:
    """Return what is in the queue; wait if there is nothing."""
    found: list[int] = []
    while not found or not ended.empty():
        with contextlib.suppress(Empty):
            found.append(ended.get(timeout=PATIENCE))
    return found


def _result(key: Key, request: Request) -> tuple[Key, Answer | ValueError]:
    try:
        return key, request.result()
    except ValueError as error:
        return key, error
