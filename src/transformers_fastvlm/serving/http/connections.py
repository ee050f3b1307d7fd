# SPDX-License-Identifier: Apache-2.0
"""Between the application and its clients: bodies read within limits, clients that leave or stop reading, the log."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from .errors import ApiError

__all__ = [
    "CLIENT_LEFT",
    "Gone",
    "Receive",
    "Record",
    "Send",
    "check_key",
    "read_body",
    "record_of",
    "send_error",
    "sender",
    "until_gone",
    "with_log",
]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CLIENT_LEFT = 499
"""Status in the log of a request whose client left before the end of the answer."""

_RECORD = "fastvlm.record"
_LINGER_SECONDS = 2.0

logger = logging.getLogger(__name__)


class Gone(Exception):
    """The client left, or takes nothing any more; there is nobody to answer."""


@dataclass
class Record:
    """What the log says of a request.

    Attributes:
        status: of the response, or CLIENT_LEFT.
        detail: further words, never of the request's content.
        body_read: whether all of the body was read.
        at_end: called once when the request is over.
    """

    status: int = CLIENT_LEFT
    detail: str = ""
    body_read: bool = False
    at_end: Callable[[], None] | None = None


def record_of(scope: Message) -> Record:
    """Return the record of a request."""
    record: Record = scope.setdefault(_RECORD, Record())
    return record


def with_log(application: Any) -> Any:
    """Return an ASGI application that also logs one line for each request."""

    async def logged(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await application(scope, receive, send)
            return
        record, start = record_of(scope), time.monotonic()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            await application(scope, receive, noting)
        finally:
            if record.at_end is not None:
                record.at_end()
            client = scope.get("client") or ("-", 0)
            path = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
            seconds = time.monotonic() - start
            detail = f" {record.detail}" if record.detail else ""
            logger.info("%s %s %s %d %.3fs%s", client[0], scope["method"], path, record.status, seconds, detail)

    return logged


def check_key(headers: Any, key: str | None) -> None:
    """Raise ApiError, 401, unless a request brings the key."""
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


async def read_body(scope: Message, headers: Any, receive: Receive, limit: int, timeout: float) -> bytes:
    """Return a request's body.

    Raises:
        ApiError: 415 for another type than JSON; 413 for more than `limit` bytes, as soon as that is known; 408 where
            it does not come in time.
        Gone: the client left.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"The content type is {kind[:80]!r}; expected application/json.", code="unsupported_media_type"
        )
    too_large = ApiError(
        413,
        f"The body has more than {limit} bytes, this server's limit. Send fewer or smaller pictures.",
        code="request_too_large",
    )
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body"):
                    record_of(scope).body_read = True
                    return bytes(body)
    except TimeoutError as error:
        raise ApiError(408, f"The body did not arrive within {timeout:g} seconds.", code="request_timeout") from error


async def until_gone(receive: Receive) -> None:
    """Return when the client leaves; what it sends meanwhile is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


def sender(send: Send, timeout: float, give_up: Callable[[], None]) -> Send:
    """Return a `send` for a client that may stop reading.

    Where it takes nothing for `timeout` seconds, `give_up` is called and Gone raised.
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
    """Answer with an error; where the body was not read, take a little of it, or the client may not see the answer.

    A connection that is closed on a client that still writes is reset, and what it was sent may be lost.
    """
    content = json.dumps(error.body).encode()
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    unread = has_body and not record_of(scope).body_read
    own = {"content-type": "application/json", "content-length": str(len(content)), **error.headers}
    if unread or error.status == 503:
        own["connection"] = "close"
    fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in own.items()]
    record_of(scope).detail = record_of(scope).detail or (error.code or "")
    await send({"type": "http.response.start", "status": error.status, "headers": fields})
    await send({"type": "http.response.body", "body": content, "more_body": unread})
    if unread:
        # Who waits to be asked for the body (Expect: 100-continue) is not asked.
        if "expect" not in headers:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER_SECONDS):
                    while (await receive()).get("more_body"):
                        pass
        await send({"type": "http.response.body", "body": b""})
