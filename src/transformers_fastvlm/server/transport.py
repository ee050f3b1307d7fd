# SPDX-License-Identifier: Apache-2.0
"""Connections of uvicorn that end if a client sends no request, does not read the answer, or has left.

uvicorn limits only the time between requests: a connection that never sends a whole head would stay open for ever.
"""

import asyncio
import errno
import logging
from collections.abc import Callable, Iterable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .request_log import record_of

__all__ = ["Connection", "close_overdue", "on_loop_error"]

_PROBES = (0.05, 0.2)
_PROBE_SECONDS = 1.0
_FULL_TABLE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_FREED_AT_ONCE = 8
_SECONDS_BETWEEN_WARNINGS = 60.0

logger = logging.getLogger(__name__)


class Connection(H11Protocol):
    """A client's connection.

    Args:
        most: maximum number of connections. A further one ends the connection that has waited longest for a request.
    """

    def __init__(self, *args: Any, most: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = most
        self._since = self._stalled_since = 0.0
        self._is_stalled = False

    def waits_since(self) -> float | None:
        """Return since when it has waited for the head of a request; None while a request is answered."""
        return self._since if self.cycle is None or self.cycle.response_complete else None

    def stalled_since(self) -> float | None:
        """Return when its client stopped reading; None while it reads."""
        return self._stalled_since if self._is_stalled else None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) > self._most:
            others = self.connections - {self}
            oldest = *_oldest(others, Connection.waits_since), *_oldest(others, Connection.stalled_since), self
            _end(oldest[:1])

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._is_stalled, self._stalled_since = True, self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._is_stalled = False
        super().resume_writing()

    def eof_received(self) -> bool | None:
        """Keep a connection whose client sent its request and closed its own side: it may still read.

        A client that has left looks the same until something is sent to it. HTTP/1.0 has nothing that could be sent
        before the answer, so such a client counts as gone.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or self.scope["http_version"] == "1.0":
            return None
        cycle.keep_alive = False
        self._probe(0)
        return True

    def _probe(self, count: int) -> None:
        """Send data that clients ignore; if the client has left, its machine answers with a reset."""
        cycle = self.cycle
        if self.transport.is_closing() or cycle.response_complete:
            return
        if not self._is_stalled:
            if not cycle.response_started:
                nothing: Any = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                self.transport.write(self.conn.send(nothing))
            elif record_of(self.scope).is_event_stream:
                self.transport.write(self.conn.send(h11.Data(data=b":\n\n")))
        delay = _PROBES[count] if count < len(_PROBES) else _PROBE_SECONDS
        self.loop.call_later(delay, self._probe, count + 1)


def close_overdue(connections: Iterable[Connection], now: float, patience: float) -> None:
    """End the connections that have waited longer than `patience` seconds for a request, or to be read."""
    for one in list(connections):
        waits, stalled = one.waits_since(), one.stalled_since()
        if any(since is not None and now - since > patience for since in (waits, stalled)):
            _end([one])


def on_loop_error(connections: set[Connection]) -> Any:
    """Return a handler of the event loop's errors.

    If no connection can be accepted because the table of files is full, asyncio calls the handler every second, up to
    once for each waiting connection. So the handler logs this once a minute, and closes the connections that have
    waited longest for a request.
    """
    said = freed = float("-inf")

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said, freed
        error, now = context.get("exception"), loop.time()
        if not (isinstance(error, OSError) and error.errno in _FULL_TABLE and "accept" in context.get("message", "")):
            loop.default_exception_handler(context)
            return
        if now - freed > 0.5:
            freed = now
            _end(_oldest(connections, Connection.waits_since)[:_FREED_AT_ONCE])
        if now - said > _SECONDS_BETWEEN_WARNINGS:
            said = now
            logger.warning("no further connection can be accepted: %s (ulimit -n)", error.strerror)

    return handle


def _oldest(connections: Iterable[Connection], since: Callable[[Connection], float | None]) -> list[Connection]:
    """Return the connections for which `since` returns a time, the oldest first."""
    return sorted((one for one in connections if since(one) is not None), key=lambda one: since(one) or 0.0)


def _end(connections: Iterable[Connection]) -> None:
    for one in connections:
        one.connections.discard(one)  # at once: uvicorn removes it only in the loop's next turn
        one.transport.abort()
