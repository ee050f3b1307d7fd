# SPDX-License-Identifier: Apache-2.0
"""Client connections: request bodies within limits, and clients that leave or stop reading."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from .api_errors import ApiError
from .request_log import Message, Receive, Send, record_of

__all__ = [
    "Bodies",
    "Gone",
    "Leaving",
    "check_key",
    "read_body",
    "send_error",
    "sender",
    "unless_over",
    "until_over",
    "with_framing",
]

T = TypeVar("T")

_LINGER_SECONDS = 2.0
_WINDOW_SECONDS = 5.0
_LEAST_RATE = 1000  # bytes a second, over each window
# Clients send the head and the body one after the other, so a short body that comes at once needs no place.
_AT_ONCE_SECONDS = 1.0
_AT_ONCE_BYTES = 1 << 16


class Gone(Exception):
    """The client left or stopped reading."""


def with_framing(application: Any) -> Any:
    """Return an ASGI application that refuses requests whose end is ambiguous."""

    async def checked(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (error := _framing_error(scope)) is None:
            await application(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        await send_error(scope, headers, receive, send, error)

    return checked


def _framing_error(scope: Message) -> ApiError | None:
    """Return the error for a request whose end is ambiguous (RFC 9112, 6.1 and 6.3)."""
    names = {name for name, _ in scope["headers"]}
    if b"transfer-encoding" not in names:
        return None
    if b"content-length" in names:
        message = "The request has Content-Length and Transfer-Encoding; send only one of them."
    elif scope["http_version"] == "1.0":
        message = "The request has Transfer-Encoding, which HTTP/1.0 does not support; send Content-Length."
    else:
        return None
    return ApiError(400, message, code="invalid_framing", headers={"connection": "close"})


def check_key(headers: Any, key: str | None) -> None:
    """Raise ApiError (401) unless a request has the key."""
    if key is None:
        return
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise ApiError(
            401,
            "The API key is missing or wrong; expected the header Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


@dataclass(eq=False)
class _Reading:
    """A body that is being read; `timer` limits the wait for its next chunk."""

    start: float
    size: int = 0
    timer: asyncio.Timeout | None = None
    ended: bool = False

    def rate(self, now: float) -> float:
        return self.size / (now - self.start)


class Bodies:
    """Request bodies that are being read, except short ones that arrive within a second of their head.

    If there are too many, or if they hold too many bytes, the slowest one that is older than a few seconds is ended.

    Args:
        most: maximum number of bodies.
        size: maximum total bytes.
    """

    def __init__(self, most: int, size: int) -> None:
        self.most, self.size = most, size
        self._all: set[_Reading] = set()

    @property
    def count(self) -> int:
        """Number of bodies."""
        return len(self._all)

    @property
    def bytes(self) -> int:
        """Bytes of all bodies so far."""
        return sum(one.size for one in self._all)

    @contextlib.contextmanager
    def one(self) -> Iterator[_Reading]:
        """Count a body until the end of the block.

        Raises:
            ApiError: 429, there are too many bodies.
        """
        if self.count >= self.most:
            self._end_slowest()
        reading = _Reading(asyncio.get_running_loop().time())
        self._all.add(reading)
        try:
            yield reading
        finally:
            self._all.discard(reading)

    def grow(self, reading: _Reading, count: int) -> None:
        """Count bytes of a body.

        Raises:
            ApiError: 429, all bodies together hold too many bytes.
        """
        reading.size += count
        if self.bytes > self.size:
            self._end_slowest(reading)

    def _end_slowest(self, but: _Reading | None = None) -> None:
        now = asyncio.get_running_loop().time()
        old = [one for one in self._all if now - one.start >= _WINDOW_SECONDS and one is not but]
        if not old:
            message = "The server is reading its maximum number of requests. Try again in 5 seconds."
            raise ApiError(429, message, code="queue_full", headers={"retry-after": "5"})
        slowest = min(old, key=lambda one: one.rate(now))
        slowest.ended = True
        self._all.discard(slowest)
        if slowest.timer is not None:
            slowest.timer.reschedule(now)


async def read_body(
    scope: Message, headers: Any, receive: Receive, limit: int, timeout: float, bodies: Bodies
) -> bytes:
    """Return a request's body.

    Raises:
        ApiError: 415 for a content type other than JSON, or a compressed body; 413 for more than `limit` bytes, as
            early as possible; 408 for a late or slow body; 429 if too many bodies are being read.
        Gone: the client left.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"The content type is {kind[:80]!r}; expected application/json.", code="unsupported_media_type"
        )
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        refusal = f"The content encoding is {encoding[:80]!r}; send uncompressed JSON, without Content-Encoding."
        raise ApiError(415, refusal, code="unsupported_media_type")
    too_large = ApiError(
        413,
        f"The body has more than {limit} bytes, this server's limit. Send fewer or smaller images.",
        code="request_too_large",
    )
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise too_large
    body = bytearray()

    def take(message: Message) -> bool:
        """Take a chunk; return whether it was the last one."""
        nonlocal body
        if message["type"] == "http.disconnect":
            raise Gone
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        record_of(scope).body_read = not message.get("more_body")
        return record_of(scope).body_read

    end = asyncio.get_running_loop().time() + timeout
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(min(_AT_ONCE_SECONDS, timeout)):
            while len(body) <= _AT_ONCE_BYTES:
                if take(await receive()):
                    return bytes(body)
    with bodies.one() as reading:
        bodies.grow(reading, len(body))
        now = reading.start
        window, held = now + _WINDOW_SECONDS, len(body)
        while True:
            if reading.ended:
                raise _too_slow("The body arrived more slowly than others, and the server is full.")
            if now >= end:
                raise _too_slow(f"The body did not arrive within {timeout:g} seconds.")
            if now >= window:
                if len(body) - held < _LEAST_RATE * _WINDOW_SECONDS:
                    raise _too_slow(f"The body arrived more slowly than {_LEAST_RATE} bytes per second.")
                window, held = now + _WINDOW_SECONDS, len(body)
            before = len(body)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(end, window)) as reading.timer:
                    if take(await receive()):
                        return bytes(body)
            bodies.grow(reading, len(body) - before)
            now = asyncio.get_running_loop().time()


def _too_slow(message: str) -> ApiError:
    return ApiError(408, message, code="request_timeout")


Leaving = asyncio.Future[ApiError | None]
"""Done when a request has to end early: with the error to send, or None if the client left."""


async def until_over(receive: Receive, refused: asyncio.Future[ApiError]) -> ApiError | None:
    """Return when the client leaves, or with the error if the request is refused; drop what the client sends."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    left = asyncio.ensure_future(gone())
    both: set[asyncio.Future[Any]] = {left, refused}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return refused.result() if refused.done() and not left.done() else None
    finally:
        left.cancel()


async def unless_over(leaving: Leaving, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it if the request ends first.

    Args:
        leaving: a task of `until_over`.

    Raises:
        Gone: the client left.
        ApiError: the request is refused.
    """
    task = asyncio.ensure_future(work)
    both: set[asyncio.Future[Any]] = {leaving, task}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise leaving.result() or Gone
        return task.result()
    finally:
        if task.cancel():
            await asyncio.wait({task})  # until its thread knows that it ended


def sender(send: Send, timeout: float, give_up: Callable[[], None]) -> Send:
    """Return a `send` for a client that may stop reading.

    If it reads nothing for `timeout` seconds, `give_up` is called and Gone is raised.
    """

    async def within(message: Message) -> None:
        try:
            await asyncio.wait_for(send(message), timeout)
        except TimeoutError:
            give_up()
            await asyncio.sleep(0.01)  # until the server has noticed that the connection is closed
            raise Gone from None

    return within


async def send_error(scope: Message, headers: Any, receive: Receive, send: Send, error: ApiError) -> None:
    """Answer with an error. Read a little of an unread body first, or the client may not see the answer.

    Closing a connection while the client still writes resets it, and the response may be lost.
    """
    content = json.dumps(error.body).encode()
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    unread = has_body and not record_of(scope).body_read
    own = {"content-type": "application/json", "content-length": str(len(content)), **error.headers}
    if unread or error.status == 503:
        own["connection"] = "close"
    fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in own.items()]
    record_of(scope).code = error.code or ""
    await send({"type": "http.response.start", "status": error.status, "headers": fields})
    await send({"type": "http.response.body", "body": content, "more_body": unread})
    if unread:
        # No 100-continue is sent: a client that waits for it sends no body.
        if "expect" not in headers:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER_SECONDS):
                    while (await receive()).get("more_body"):
                        pass
        await send({"type": "http.response.body", "body": b""})
