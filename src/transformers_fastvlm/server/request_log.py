# SPDX-License-Identifier: Apache-2.0
"""One record for each request: a line of the log, as text or as JSON, and never what the request says."""

import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CLIENT_LEFT", "JsonLines", "Message", "Receive", "Record", "Send", "log", "record_of", "with_record"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CLIENT_LEFT = 499
"""Status in the log for clients that left before the end of the answer."""

ENDPOINTS = ("/v1/chat/completions", "/v1/responses", "/v1/models", "/health", "/metrics")

_RECORD = "fastvlm.record"
_SHOWN_PATH = 200

logger = logging.getLogger(__name__)


@dataclass
class Record:
    """What is known about a request, without its content.

    Attributes:
        client, method, path: as received; the path is cut.
        start: `time.perf_counter()` at its head.
        id: of the answer, None before there is one.
        status: status of the response, or CLIENT_LEFT.
        code: of the error that was sent.
        images, prompt_tokens, completion_tokens: numbers; the prompt's tokens include those of images.
        finish_reasons: of each answer: "stop", "length", "cancelled" or "error".
        seconds: durations of its parts so far: read, prepare, queue, first_token (from the model's start), generate
            (from the model's start to the end) and, at the end, total.
        first_token_at: `time.perf_counter()` at the first token.
        body_read: whether the whole body was read.
        is_event_stream: whether a response with server-sent events has started.
        at_end: called once when the request has ended.
    """

    client: str = "-"
    method: str = ""
    path: str = ""
    start: float = field(default_factory=time.perf_counter)
    id: str | None = None
    status: int = CLIENT_LEFT
    code: str = ""
    images: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    first_token_at: float | None = None
    body_read: bool = False
    is_event_stream: bool = False
    at_end: Callable[[], None] | None = None

    @property
    def endpoint(self) -> str:
        """The path's label, one of a few; clients can request any path."""
        if self.path in ENDPOINTS:
            return self.path
        return "/v1/models" if self.path.startswith("/v1/models/") else "other"

    def took(self, part: str) -> None:
        """Record a part that ends now, and that began where the parts so far end."""
        self.seconds[part] = time.perf_counter() - self.start - sum(self.seconds.values())

    def fields(self) -> dict[str, Any]:
        """Return what a line of JSON has."""
        return {
            "id": self.id,
            "client": self.client,
            "method": self.method,
            "path": self.path,
            "endpoint": self.endpoint,
            "status": self.status,
            "error": self.code or None,
            "stream": self.is_event_stream,
            "finish_reasons": list(self.finish_reasons),
            "images": self.images,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": {part: round(seconds, 6) for part, seconds in self.seconds.items()},
        }

    def text(self) -> str:
        """Return the record as a line of text."""
        line = f"{self.client} {self.method} {self.path} {self.status} {self.seconds['total']:.3f}s"
        if self.id is not None:
            queued = self.seconds.get("queue", 0.0)
            line += f" images={self.images} prompt={self.prompt_tokens} answer={self.completion_tokens}"
            line += f" queued={queued:.3f}s"
        return f"{line} {self.code}" if self.code else line


class JsonLines(logging.Formatter):
    """Formats log records as JSON, one per line; those of requests have the fields of `Record.fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a line, without its end."""
        line = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        request: Record | None = getattr(record, "request", None)
        if request is not None:
            return json.dumps(line | request.fields())
        line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def record_of(scope: Message) -> Record:
    """Return the record of a request."""
    record: Record = scope.setdefault(_RECORD, Record())
    return record


def log(record: Record) -> None:
    """Write the line of a request that has ended."""
    logger.info("%s", record.text(), extra={"request": record})


def with_record(application: Any, ended: Callable[[Record], None]) -> Any:
    """Return an ASGI application that also records each request, and calls `ended` at its end."""

    async def recorded(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await application(scope, receive, send)
            return
        record = record_of(scope)
        record.client, record.method = (scope.get("client") or ("-", 0))[0], scope["method"]
        record.path = scope.get("raw_path", b"").decode("ascii", "replace")[:_SHOWN_PATH]

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                kinds = [value for name, value in message["headers"] if name == b"content-type"]
                record.is_event_stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
            await send(message)

        try:
            await application(scope, receive, noting)
        finally:
            if record.at_end is not None:
                record.at_end()
            record.seconds["total"] = time.perf_counter() - record.start
            ended(record)

    return recorded
