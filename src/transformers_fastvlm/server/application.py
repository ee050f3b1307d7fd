# SPDX-License-Identifier: Apache-2.0
"""The ASGI application: its paths and the handling of requests."""

import asyncio
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from ..engines import Engine, Prompt, Request, Sampling
from ..engines.base import MAX_SEED
from .admission import Admission, Place
from .answer_sending import EventStream, Form, answer, wait_for_turn
from .api_errors import ApiError
from .completions import ChatForm
from .connections import (
    Bodies,
    Gone,
    Leaving,
    check_key,
    read_body,
    send_error,
    sender,
    unless_over,
    until_over,
    with_framing,
)
from .fair_turns import Turns
from .json_bodies import parse_json
from .preparation import Preparation
from .protocol import ChatRequest, parse_chat, unknown_model
from .remote_images import Fetcher
from .request_log import CLIENT_LEFT, Record, Send, log, record_of, with_record
from .response_objects import ResponseForm, parse_response
from .server_metrics import Metrics
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
        admission: bounds of all requests together.
        turns: order in which the engine gets requests. It holds few more than it answers at once: its own order is
            that of arrival.
        active: number of accepted requests that have not ended.
        draining: whether new requests are refused because the server is shutting down.
        abort: closes a client's connection at once, given its scope.
        metrics: counters of what has happened.
    """

    def __init__(self, engine: Engine, settings: Settings, fetcher: Fetcher | None = None) -> None:
        self.engine, self.settings = engine, settings
        self.fetcher = fetcher or Fetcher(settings.image_hosts, settings.fetch_timeout)
        self.preparation = Preparation(engine, settings, self.fetcher)
        self.bodies = Bodies(settings.max_requests, _BODIES_HELD * settings.max_body_bytes)
        self.admission = Admission(
            settings.max_requests, settings.max_held_bytes, settings.max_held_images, self._retry_seconds
        )
        self.turns = Turns(settings.batch_size + max(1, settings.batch_size // 4))
        self._rows: list[Request] = []
        self.active, self.draining = 0, False
        self.created = int(time.time())
        self.abort: Callable[[Any], None] = lambda scope: None
        self.metrics = Metrics(self._gauges())

    def _gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        def running() -> int:
            return sum(one.begun_at is not None and not one.done for one in self._rows)

        return {
            "rows_running": ("Answers that the model generates now: the size of its batch.", running),
            "rows_waiting": ("Answers that wait for the model.", lambda: self.waiting),
            "requests_active": ("Requests that were accepted and have not ended.", lambda: self.active),
            "requests_reading": ("Requests whose body is being read.", lambda: self.bodies.count),
            "held_bytes": ("Bytes of bodies and images.", lambda: self.admission.bytes + self.bodies.bytes),
            "held_images": ("Images of all requests.", lambda: self.admission.images),
        }

    @property
    def waiting(self) -> int:
        """Answers that wait for the model."""
        return sum(turn.size for turn in self.turns.waiting) + sum(one.begun_at is None for one in self._rows)

    def model(self) -> dict[str, Any]:
        """Return the API's description of the model."""
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.created,
            "owned_by": "transformers-fastvlm",
            "max_model_len": self.preparation.context,
        }

    async def answer(self, api: "Api", scope: Any, headers: Any, receive: Any, send: Any) -> None:
        """Answer a request of an API.

        Raises:
            ApiError: it is refused, or failed before anything was sent.
            Gone: the client left.
        """
        check_key(headers, self.settings.api_key)
        record = record_of(scope)
        self._check_alive()
        self.admission.check(record.client)  # a body that would be refused is not read
        limit, timeout = self.settings.max_body_bytes, self.settings.client_timeout
        body = await read_body(scope, headers, receive, limit, timeout, self.bodies)
        record.took("read")
        self._check_alive()
        place = self.admission.admit(record.client, len(body))
        self.active += 1
        record.at_end = lambda: self._let_go(place)
        leaving = asyncio.ensure_future(until_over(receive, place.refused))
        try:
            to_client = sender(send, timeout, lambda: self.abort(scope))
            await self._answer(api, body, place, leaving, to_client, record)
        finally:
            leaving.cancel()

    async def _answer(
        self, api: "Api", body: bytes, place: Place, leaving: Leaving, send: Send, record: Record
    ) -> None:
        chat: ChatRequest = await unless_over(leaving, self.preparation.parse(_parse, api, body, self.settings))
        del body
        record.images = len(chat.image_urls)
        await unless_over(leaving, self.preparation.parse(_check, self.engine, chat))
        self.admission.ensure(place, images=record.images)
        prompt, max_tokens = await unless_over(leaving, self.preparation.prompt(chat, place))
        chat = dataclasses.replace(chat, messages=[], image_urls=())  # the prompt holds all of it
        place.replace(_size(prompt))
        record.took("prepare")
        record.prompt_tokens = prompt.tokens
        form = api.form(chat, self.settings.name)
        record.id = form.id
        samplings = _samplings(chat, max_tokens)
        events = EventStream(form, send) if chat.stream else None
        turn = self.turns.ask(place.client, len(samplings))
        try:
            await wait_for_turn(turn.given, leaving, events, place.settle)
            place.settle()
            await self._generate(chat, form, prompt, samplings, turn.keep, leaving, events, send, record)
        except ApiError as error:
            if events is None or not events.has_begun:
                raise
            record.code = error.code or ""
            await events.fail(error)  # without [DONE]: the answer is not complete
        finally:
            turn.end()

    async def _generate(
        self,
        chat: ChatRequest,
        form: Form,
        prompt: Prompt,
        samplings: Sequence[Sampling],
        keep: Callable[[int], None],
        leaving: Leaving,
        events: EventStream | None,
        send: Send,
        record: Record,
    ) -> None:
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        requests: list[Request] = []

        def advanced() -> None:
            if requests:
                keep(sum(not request.done for request in requests))  # a client that reads slowly delays nobody
            news.set()

        def changed() -> None:
            loop.call_soon_threadsafe(advanced)

        submit = functools.partial(self.engine.submit, prompt, *samplings, changed=changed)
        try:
            # A schema is compiled, which takes its time; the loop does not wait for it.
            requests += submit() if chat.schema is None else await self.preparation.parse(submit)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        advanced()
        self._rows += requests
        try:
            choices = requests * chat.n if len(requests) == 1 else requests  # greedy choices share one
            await answer(form, choices, news, leaving, events, send)
        finally:
            for request in requests:
                self._rows.remove(request)
                if not request.done:
                    request.cancel()
            _note(record, requests)

    def close(self) -> None:
        """End the threads, after the accepted requests."""
        self.preparation.close()

    def _check_alive(self) -> None:
        if self.draining:
            raise ApiError(503, "The server is shutting down. Try again later.", code="shutting_down")
        if not self.engine.is_alive:
            message = "The model has failed; see the server's log. The server must be restarted."
            raise ApiError(503, message, code="model_failed")

    def _retry_seconds(self) -> int:
        """Return the seconds after which a refused client may try again."""
        batches = math.ceil(self.admission.count / self.settings.batch_size)
        return min(max(1, math.ceil(batches * self.engine.batch_seconds)), _MAX_RETRY_SECONDS)

    def _let_go(self, place: Place) -> None:
        self.active -= 1
        place.leave()


def _check(engine: Engine, chat: ChatRequest) -> None:
    """Refuse a request that the engine cannot answer, before its images are decoded."""
    try:
        engine.check(_samplings(chat, 1)[0])
    except (ValueError, ImportError) as error:
        param = "response_format" if chat.schema is not None else None
        code = "invalid_schema" if chat.schema is not None else "invalid_value"
        raise ApiError(400, f"{error}", param=param, code=code) from error


def _samplings(chat: ChatRequest, max_tokens: int) -> list[Sampling]:
    """Return the options of each answer; greedy ones are one, since they are equal."""
    sampling = Sampling(
        max_new_tokens=max_tokens,
        temperature=chat.temperature,
        top_p=chat.top_p,
        seed=None if chat.seed is None else chat.seed % (MAX_SEED + 1),
        stop=chat.stop,
        presence_penalty=chat.presence_penalty,
        frequency_penalty=chat.frequency_penalty,
        logit_bias=chat.logit_bias,
        logprobs=chat.logprobs,
        schema=chat.schema,
    )
    return [sampling.of_row(index) for index in range(1 if chat.temperature == 0 else chat.n)]


def _size(prompt: Prompt) -> int:
    """Return the bytes of a prompt's images and tensors."""
    return _bytes(prompt.inputs) + sum(image.width * image.height * len(image.getbands()) for image in prompt.images)


def _bytes(value: Any) -> int:
    """Return the bytes of tensors and arrays, alone or inside of dicts, lists and objects of an engine."""
    if isinstance(value, dict):
        return sum(_bytes(one) for one in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(one) for one in value)
    return int(getattr(value, "nbytes", 0))


def _note(record: Record, requests: Sequence[Request]) -> None:
    """Record how the answers came about."""
    begun = [one.begun_at for one in requests if one.begun_at is not None]
    first = [one.first_at for one in requests if one.first_at is not None]
    record.completion_tokens = sum(one.tokens for one in requests)
    record.finish_reasons = tuple(
        "cancelled" if one.cancelled else "error" if one.answer is None else one.answer.finish_reason
        for one in requests
    )
    if not begun:
        record.took("queue")
        return
    record.seconds["queue"] = min(begun) - record.start - sum(record.seconds.values())
    if first:
        record.first_token_at = min(first)
        record.seconds["first_token"] = min(first) - min(begun)
    ended = [one.ended_at or time.perf_counter() for one in requests]
    record.seconds["generate"] = max(ended) - min(begun)


@dataclasses.dataclass(frozen=True)
class Api:
    """One of OpenAI's APIs: how a request is read, and how its answer is written."""

    parse: Callable[[Any, Settings], ChatRequest]
    form: Callable[[ChatRequest, str], Form]


_CHAT = Api(parse_chat, ChatForm)
_RESPONSES = Api(parse_response, ResponseForm)


def _parse(api: Api, body: bytes, settings: Settings) -> ChatRequest:
    return api.parse(parse_json(body), settings)


def create_app(service: Service) -> Any:
    """Return the ASGI application of a service; its shutdown closes the service."""
    from fastapi import FastAPI
    from fastapi import Request as HttpRequest
    from fastapi.responses import JSONResponse, Response
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException

    class Refusal(Response):
        """Sends an error."""

        def __init__(self, headers: Any, error: ApiError) -> None:
            super().__init__(status_code=error.status)
            self._received, self._error = headers, error

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send_error(scope, self._received, receive, send, self._error)

    class Answered(Response):
        """Reads a request, and sends the answer or an error."""

        def __init__(self, api: Api) -> None:
            super().__init__()
            self._api = api

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            headers = Headers(scope=scope)
            try:
                await service.answer(self._api, scope, headers, receive, send)
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
        return Answered(_CHAT)

    @app.post("/v1/responses")
    async def responses() -> Response:
        return Answered(_RESPONSES)

    @app.get("/v1/models")
    async def models(request: HttpRequest) -> dict[str, Any]:
        check_key(request.headers, service.settings.api_key)
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(request: HttpRequest, name: str) -> dict[str, Any]:
        check_key(request.headers, service.settings.api_key)
        if name != service.settings.name:
            raise unknown_model(name, service.settings)
        return service.model()

    @app.get("/health")
    async def health() -> Response:
        status = "ending" if service.draining else "ok" if service.engine.is_alive else "failed"
        return JSONResponse({"status": status, "requests": service.active}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics(request: HttpRequest) -> Response:
        if not service.settings.open_metrics:
            check_key(request.headers, service.settings.api_key)
        content, kind = service.metrics.page()
        return Response(content, headers={"content-type": kind})

    @app.exception_handler(ApiError)
    async def refused(request: HttpRequest, error: ApiError) -> Response:
        return Refusal(request.headers, error)

    @app.exception_handler(HTTPException)
    async def not_there(request: HttpRequest, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}."
        return Refusal(request.headers, ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(request: HttpRequest, error: Exception) -> Response:
        message = "The request failed; see the server's log."
        return Refusal(request.headers, ApiError(500, message, code="internal_error"))

    def ended(record: Record) -> None:
        service.metrics.count(record)
        log(record)

    return with_record(with_framing(app), ended)
