# SPDX-License-Identifier: Apache-2.0
"""Send answers to the client: complete, or as a stream of server-sent events."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..engines import Answer, Request, TokenLogprob
from .api_errors import ApiError
from .connections import Gone, Leaving
from .request_log import Send

__all__ = ["EventStream", "Form", "answer", "wait_for_turn"]

_PING_SECONDS = 15.0


class Form(Protocol):
    """The JSON of an API for one request; see `ChatForm`."""

    id: str

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the body of a response that is not streamed; `answers` are those of all choices."""

    def first(self) -> list[Any]:
        """Return the events that begin a stream: JSON values or texts."""

    def piece(self, index: int, text: str, tokens: Sequence[TokenLogprob]) -> list[Any]:
        """Return the events for new text of a choice, and the tokens that came with it, if asked for."""

    def last(self, answers: Sequence[Answer]) -> list[Any]:
        """Return the events that end a stream."""


class EventStream:
    """A response of server-sent events.

    Attributes:
        has_begun: whether anything was sent.
    """

    def __init__(self, form: Form, send: Send) -> None:
        self._form, self._send = form, send
        self.has_begun = False

    async def begin(self) -> None:
        """Send the head and the first events, once."""
        if self.has_begun:
            return
        self.has_begun = True
        fields = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # for nginx
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": fields})
        await self.say(self._form.first())

    async def say(self, events: Sequence[Any], last: bool = False) -> None:
        """Send events: JSON values, or texts as they are."""
        body = "".join(_event(event) for event in events).encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def ping(self) -> None:
        """Send a comment, which keeps the connection open."""
        await self.begin()
        await self._send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})

    async def fail(self, error: ApiError) -> None:
        """End with an error."""
        await self.say([error.body], last=True)


def _event(event: Any) -> str:
    if isinstance(event, str):
        return f"data: {event}\n\n"
    name = f"event: {event['type']}\n" if "type" in event else ""
    # json.dumps writes ASCII: some clients split lines at more characters than the format allows.
    return f"{name}data: {json.dumps(event)}\n\n"


async def wait_for_turn(
    given: asyncio.Future[None], leaving: Leaving, events: EventStream | None, settle: Callable[[], None]
) -> None:
    """Wait until the model may begin with a request.

    Args:
        given: done when the model may begin.
        leaving: see `Leaving`.
        events: the stream, if the answer is streamed: it gets comments while it waits.
        settle: called before anything is sent.

    Raises:
        Gone: the client left.
        ApiError: the request is refused.
    """
    both: set[asyncio.Future[Any]] = {given, leaving}
    while not given.done():
        await asyncio.wait(both, timeout=_PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            raise leaving.result() or Gone
        if not given.done() and events is not None:
            settle()
            await events.ping()


async def answer(
    form: Form,
    choices: list[Request],
    news: asyncio.Event,
    leaving: Leaving,
    events: EventStream | None,
    send: Send,
) -> None:
    """Send the engine's answer.

    Args:
        form: the format of the answer.
        choices: the engine's request for each choice; choices of one text may share one.
        news: set at each change of a request.
        leaving: done when the client has left.
        events: the stream, if the answer is streamed.
        send: ASGI's `send`.

    Raises:
        Gone: the client left.
        ApiError: the answer failed.
    """
    leaving.add_done_callback(lambda _: news.set())
    if events is not None:
        await _stream(form, choices, news, leaving, events)
        return
    while not all(request.done for request in choices):
        await news.wait()
        news.clear()
        if leaving.done():
            raise Gone
    body = json.dumps(form.whole(_answers(choices))).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def _stream(
    form: Form, choices: list[Request], news: asyncio.Event, leaving: Leaving, events: EventStream
) -> None:
    """Send text as it is generated; for slow clients it is joined, so memory never exceeds the answer."""
    await events.begin()
    done, sent = False, [0] * len(choices)
    while not done:
        try:
            await asyncio.wait_for(news.wait(), _PING_SECONDS)
        except TimeoutError:
            await events.ping()
            continue
        news.clear()
        if leaving.done():
            raise Gone
        done = all(request.done for request in choices)  # read before the text, so that the last part is taken
        texts = {request: _taken(request) for request in dict.fromkeys(choices)}
        said: list[Any] = []
        for index, request in enumerate(choices):
            tokens = request.logprobs[sent[index] :] if texts[request] or done else []
            sent[index] += len(tokens)
            if texts[request] or tokens:
                said += form.piece(index, texts[request], tokens)
        if said:
            await events.say(said)
    await events.say(form.last(_answers(choices)), last=True)


def _taken(request: Request) -> str:
    pieces = []
    while request.pieces:
        pieces.append(request.pieces.popleft())
    return "".join(pieces)


def _answers(choices: list[Request]) -> list[Answer]:
    """Return all answers.

    Raises:
        ApiError: one failed.
    """
    for request in choices:
        if request.error is not None:
            raise _failure(request, request.error)
    return [request.result() for request in choices]


def _failure(request: Request, error: BaseException) -> ApiError:
    if request.sampling.schema is not None and isinstance(error, ValueError):
        return ApiError(400, f"{error}", param="response_format", code="invalid_schema")
    if type(error).__name__ == "OutOfMemoryError":
        return ApiError(
            503,
            "The server ran out of memory for this request or others in its batch. Try again, or send less.",
            code="out_of_memory",
        )
    return ApiError(500, "The answer failed; see the server's log.", code="internal_error")
