# SPDX-License-Identifier: Apache-2.0
"""An answer on its way to the client: whole, or as a stream of server-sent events."""

import asyncio
import json
import time
import uuid
from typing import Any

from .api_errors import ApiError
from .connections import Gone, Send
from .generation import Job
from .protocol import ChatRequest, chunk, completion, usage

__all__ = ["answer"]

_PING_SECONDS = 15.0


async def answer(
    chat: ChatRequest,
    job: Job,
    model: str,
    news: asyncio.Event,
    leaving: asyncio.Future[None],
    send: Send,
) -> None:
    """Send what the worker makes of a job.

    Args:
        chat, job: what was asked, and what was submitted for it.
        model: its name.
        news: set on each change of the job.
        leaving: done when the client has left.
        send: of ASGI.

    Raises:
        Gone: the client left.
        ApiError: the answer failed, and nothing of it was sent.
    """
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    leaving.add_done_callback(lambda _: news.set())
    await (_stream if chat.stream else _whole)(chat, job, head, news, leaving, send)


async def _whole(
    chat: ChatRequest, job: Job, head: dict[str, Any], news: asyncio.Event, leaving: asyncio.Future[None], send: Send
) -> None:
    while not job.done:
        await news.wait()
        news.clear()
        if leaving.done():
            raise Gone
    if job.error is not None:
        raise _failure(job.error)
    rows = _rows(chat, job)
    answers = [(job.answers[row].text, job.answers[row].reason or "stop") for row in rows]
    body = json.dumps(completion(head, answers, _usage(chat, job))).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def _stream(
    chat: ChatRequest, job: Job, head: dict[str, Any], news: asyncio.Event, leaving: asyncio.Future[None], send: Send
) -> None:
    """Send pieces as they come. What a slow client has not taken yet is joined, so it is never more than the answer."""
    rows = _rows(chat, job)
    empty = {"usage": None} if chat.include_usage else {}

    async def say(*events: dict[str, Any] | str, last: bool = False) -> None:
        # In ASCII, as json.dumps writes it: some clients end a line at more characters than the format does.
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
        done = job.done  # looked at before the pieces, so that the last ones are taken
        texts: dict[int, str] = {}
        while job.pieces:
            row, piece = job.pieces.popleft()
            texts[row] = texts.get(row, "") + piece
        events = [chunk(head, index, {"content": texts[row]}) | empty for index, row in enumerate(rows) if row in texts]
        if events:
            await say(*events)
    if job.error is not None:
        await say(_failure(job.error).body, last=True)  # without [DONE]: this is no end of an answer
        return
    ends = [chunk(head, index, {}, job.answers[row].reason or "stop") | empty for index, row in enumerate(rows)]
    tokens = {**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(chat, job)}
    await say(*ends, *([tokens] if chat.include_usage else []), "[DONE]", last=True)


def _rows(chat: ChatRequest, job: Job) -> list[int]:
    """Return the row that answers each choice; greedy choices share one."""
    return [0] * chat.n if job.is_greedy else list(range(chat.n))


def _usage(chat: ChatRequest, job: Job) -> dict[str, int]:
    return usage(job.prompt_tokens, sum(job.answers[row].tokens for row in _rows(chat, job)))


def _failure(error: BaseException) -> ApiError:
    if type(error).__name__ == "OutOfMemoryError":
        return ApiError(
            503,
            "The server ran out of memory for this request, or for those answered together with it. Try again, or send "
            "less.",
            code="out_of_memory",
        )
    return ApiError(500, "The answer failed; the server's log says why.", code="internal_error")
