# SPDX-License-Identifier: Apache-2.0
"""Send an answer to the client: complete, or as a stream of server-sent events."""

import asyncio
import json
import time
import uuid
from typing import Any

from ..engines import Request
from .api_errors import ApiError
from .completions import chunk, completion, usage
from .connections import Gone, Send
from .protocol import ChatRequest

__all__ = ["answer"]

_PING_SECONDS = 15.0


async def answer(
    chat: ChatRequest,
    requests: list[Request],
    model: str,
    news: asyncio.Event,
    leaving: asyncio.Future[None],
    send: Send,
) -> None:
    """Send the engine's answer.

    Args:
        chat, requests: the chat request, and its engine requests: one for each choice, or one for all.
        model: name of the model.
        news: set at each change of a request.
        leaving: done when the client has left.
        send: ASGI's `send`.

    Raises:
        Gone: the client left.
        ApiError: the answer failed before any of it was sent.
    """
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    leaving.add_done_callback(lambda _: news.set())
    if chat.stream:
        await _stream(chat, requests, head, news, leaving, send)
        return
    while not all(request.done for request in requests):
        await news.wait()
        news.clear()
        if leaving.done():
            raise Gone
    if (error := _error(requests)) is not None:
        raise _failure(error)
    answers = [_answer(request) for request in _choices(chat, requests)]
    body = json.dumps(completion(head, answers, _usage(chat, requests))).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def _stream(
    chat: ChatRequest,
    requests: list[Request],
    head: dict[str, Any],
    news: asyncio.Event,
    leaving: asyncio.Future[None],
    send: Send,
) -> None:
    """Send pieces as they are generated; for slow clients they are joined, so memory never exceeds the answer."""
    choices = _choices(chat, requests)
    empty = {"usage": None} if chat.include_usage else {}

    async def say(*events: dict[str, Any] | str, last: bool = False) -> None:
        # json.dumps writes ASCII: some clients split lines at more characters than the format allows.
        texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
        body = "".join(f"data: {text}\n\n" for text in texts).encode()
        await send({"type": "http.response.body", "body": body, "more_body": not last})

    fields = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # for nginx
    ]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await say(*[chunk(head, index, {"role": "assistant", "content": ""}) | empty for index in range(chat.n)])
    done = False
    while not done:
        try:
            await asyncio.wait_for(news.wait(), _PING_SECONDS)
        except TimeoutError:
            await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
            continue
        news.clear()
        if leaving.done():
            raise Gone
        done = all(request.done for request in requests)  # before the pieces, so that the last ones are taken
        texts = {id(request): _taken(request) for request in requests}
        new = [(index, text) for index, request in enumerate(choices) if (text := texts[id(request)])]
        events = [chunk(head, index, {"content": text}) | empty for index, text in new]
        if events:
            await say(*events)
    if (error := _error(requests)) is not None:
        await say(_failure(error).body, last=True)  # without [DONE]: the answer is not complete
        return
    ends = [chunk(head, index, {}, _answer(request)[1]) | empty for index, request in enumerate(choices)]
    tokens = {**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(chat, requests)}
    await say(*ends, *([tokens] if chat.include_usage else []), "[DONE]", last=True)


def _choices(chat: ChatRequest, requests: list[Request]) -> list[Request]:
    """Return the request of each choice; greedy choices share one."""
    return requests * chat.n if len(requests) == 1 else requests


def _taken(request: Request) -> str:
    pieces = []
    while request.pieces:
        pieces.append(request.pieces.popleft())
    return "".join(pieces)


def _answer(request: Request) -> tuple[str, str]:
    answered = request.result()
    return answered.text, answered.finish_reason


def _error(requests: list[Request]) -> BaseException | None:
    return next((request.error for request in requests if request.error is not None), None)


def _usage(chat: ChatRequest, requests: list[Request]) -> dict[str, int]:
    return usage(requests[0].prompt.tokens, sum(request.tokens for request in _choices(chat, requests)))


def _failure(error: BaseException) -> ApiError:
    if type(error).__name__ == "OutOfMemoryError":
        return ApiError(
            503,
            "The server ran out of memory for this request or others in its batch. Try again, or send less.",
            code="out_of_memory",
        )
    return ApiError(500, "The answer failed; see the server's log.", code="internal_error")
