# SPDX-License-Identifier: Apache-2.0
"""The ASGI application: its paths and the handling of requests."""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..engines import Engine, Sampling
from ..engines.base import MAX_SEED
from .api_errors import ApiError
from .connections import (
    CLIENT_LEFT,
    Bodies,
    Gone,
    Record,
    Send,
    check_key,
    read_body,
    record_of,
    send_error,
    sender,
    unless_gone,
    until_gone,
    with_log,
)
from .preparation import Preparation
from .protocol import ChatRequest, parse_chat, parse_json, unknown_model
from .remote_images import Fetcher
from .responses import answer
from .settings import Settings

__all__ = ["Service", "create_app"]

_MAX_RETRY_SECONDS = 60
_BODIES_HELD = 8  # of the largest size, while they are being read


class Service:
    """A model that answers requests, and the state of its active requests.

    Args:
        engine: the model. The caller closes it, after this service.
        settings: limits and names.
        fetcher: downloads images; by default from the allowed hosts on the public internet.

    Attributes:
        bodies: request bodies that are being read; their requests are not active yet.
        active: number of accepted requests that have not ended.
        draining: whether new requests are refused because the server is shutting down.
        abort: closes a client's connection at once, given its scope.
    """

    def __init__(self, engine: Engine, settings: Settings, fetcher: Fetcher | None = None) -> None:
        self.engine, self.settings = engine, settings
        self.fetcher = fetcher or Fetcher(settings.image_hosts, settings.fetch_timeout)
        self.preparation = Preparation(engine, settings, self.fetcher)
        self.bodies = Bodies(settings.max_requests, _BODIES_HELD * settings.max_body_bytes)
        self.active, self.draining = 0, False
        self.created = int(time.time())
        self.abort: Callable[[Any], None] = lambda scope: None

    def model(self) -> dict[str, Any]:
        """Return the API's description of the model."""
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.created,
            "owned_by": "transformers-fastvlm",
            "max_model_len": self.preparation.context,
        }

    async def chat(self, scope: Any, headers: Any, receive: Any, send: Any) -> None:
        """Answer a request for a chat completion.

        Raises:
            ApiError: it is refused, or failed before anything was sent.
            Gone: the client left.
        """
        check_key(headers, self.settings.api_key)
        record = record_of(scope)
        self._check_room()  # a body that would be refused is not read
        limit, timeout = self.settings.max_body_bytes, self.settings.client_timeout
        body = await read_body(scope, headers, receive, limit, timeout, self.bodies)
        self._check_room()
        self.active += 1
        record.at_end = self._let_go
        leaving = asyncio.ensure_future(until_gone(receive))
        try:
            await self._answer(body, leaving, sender(send, timeout, lambda: self.abort(scope)), record)
        finally:
            leaving.cancel()

    async def _answer(self, body: bytes, leaving: asyncio.Future[None], send: Send, record: Record) -> None:
        chat: ChatRequest = await unless_gone(leaving, self.preparation.parse(_parse, body, self.settings))
        del body
        prompt, max_tokens = await unless_gone(leaving, self.preparation.prompt(chat))
        chat = dataclasses.replace(chat, messages=[], pictures=())  # the prompt holds all of it
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def changed() -> None:
            loop.call_soon_threadsafe(news.set)

        sampling = Sampling(
            max_new_tokens=max_tokens,
            temperature=chat.temperature,
            top_p=chat.top_p,
            seed=None if chat.seed is None else chat.seed % (MAX_SEED + 1),
            stop=chat.stop,
        )
        samplings = [sampling.of_row(index) for index in range(1 if chat.temperature == 0 else chat.n)]
        try:
            requests = self.engine.submit(prompt, *samplings, changed=changed)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        try:
            await answer(chat, requests, self.settings.name, news, leaving, send)
        finally:
            for request in requests:
                if not request.done:
                    request.cancel()
            made, waited = sum(request.tokens for request in requests), requests[0].waited
            images = len(prompt.image_tokens)
            record.detail = f"images={images} prompt={prompt.tokens} answer={made} queued={waited:.3f}s"

    def close(self) -> None:
        """End the threads, after the accepted requests."""
        self.preparation.close()

    def _check_room(self) -> None:
        """Refuse a request above the limit, so that memory stays bounded for any clients."""
        if self.draining:
            raise ApiError(503, "The server is shutting down. Try again later.", code="shutting_down")
        if not self.engine.is_alive:
            message = "The model has failed; see the server's log. The server must be restarted."
            raise ApiError(503, message, code="model_failed")
        if self.active >= self.settings.max_requests:
            batches = math.ceil(self.active / self.settings.batch_size)
            seconds = min(max(1, math.ceil(batches * self.engine.batch_seconds)), _MAX_RETRY_SECONDS)
            raise ApiError(
                429,
                f"The server already has {self.active} requests, its limit. Try again in {seconds} seconds.",
                code="queue_full",
                headers={"retry-after": str(seconds)},
            )

    def _let_go(self) -> None:
        self.active -= 1


def _parse(body: bytes, settings: Settings) -> ChatRequest:
    return parse_chat(parse_json(body), settings)


def create_app(service: Service) -> Any:
    """Return the ASGI application of a service; its shutdown closes the service."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException

    class Refusal(Response):
        """Sends an error."""

        def __init__(self, headers: Any, error: ApiError) -> None:
            super().__init__(status_code=error.status)
            self._received, self._error = headers, error

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send_error(scope, self._received, receive, send, self._error)

    class Chat(Response):
        """Reads a request, and sends the answer or an error."""

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            headers = Request(scope).headers
            try:
                await service.chat(scope, headers, receive, send)
            except ApiError as error:
                await send_error(scope, headers, receive, send, error)
            except Gone:
                record_of(scope).status = CLIENT_LEFT

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # No documentation pages (openapi_url): they would load scripts from other hosts.
    app = FastAPI(title="fastvlm serve", lifespan=lifespan, openapi_url=None, redirect_slashes=False)

    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        return Chat()

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request.headers, service.settings.api_key)
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        check_key(request.headers, service.settings.api_key)
        if name != service.settings.name:
            raise unknown_model(name, service.settings)
        return service.model()

    @app.get("/health")
    async def health() -> Response:
        status = "ending" if service.draining else "ok" if service.engine.is_alive else "failed"
        return JSONResponse({"status": status, "requests": service.active}, 200 if status == "ok" else 503)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return Refusal(request.headers, error)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}."
        return Refusal(request.headers, ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        message = "The request failed; see the server's log."
        return Refusal(request.headers, ApiError(500, message, code="internal_error"))

    return with_log(app)
