# SPDX-License-Identifier: Apache-2.0
"""Prepare the model's inputs from a request, in threads other than the model's."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from .. import compat
from ..engines import Engine, Prompt, PromptTooLong
from ..images.fetching import Budget
from .admission import Place
from .api_errors import ApiError
from .connections import Gone
from .daemon_threads import DaemonThreads
from .fair_turns import Turn, Turns
from .protocol import ChatRequest
from .remote_images import Fetcher
from .request_images import data_of, decode, is_remote
from .settings import Settings

__all__ = ["Preparation"]

_FETCHING = 16
_THREADS = 2  # of each lane
_SECONDS = 30.0  # for preparing a request, from the moment at which a thread takes it
_WAIT_SECONDS = 60.0  # for a thread
_END_SECONDS = 2.0  # for an image whose request has ended
_BYTES_OF_A_TOKEN = 16
_MAX_TEXT_BYTES = 2**20  # of a request's texts together


class _Work:
    """Work of a preparation thread, with its deadline and whether it was cancelled.

    Args:
        begun: called on the thread that starts the work.
    """

    def __init__(self, begun: Callable[[], object]) -> None:
        self.cancelled = False
        self._begun, self._end = begun, math.inf

    def begin(self) -> None:
        self._end = time.monotonic() + _SECONDS
        self._begun()

    def check(self) -> None:
        """Raise Gone or ApiError if the work should end; called between its steps."""
        if self.cancelled:
            raise Gone
        if time.monotonic() > self._end:
            raise self.too_slow()

    def too_slow(self) -> ApiError:
        """Return the error for a request that was not prepared in time."""
        if self._end == math.inf:
            message = "The server is busy with the images of other requests. Try again in 30 seconds."
            return ApiError(503, message, code="images_busy", headers={"retry-after": "30"})
        message = f"Preparing the request took more than {_SECONDS:g} seconds. Send fewer or smaller images."
        return ApiError(400, message, param="messages", code="image_too_slow")


class _Held(Budget):
    """Bytes that a request's downloads may use, which count for all requests too."""

    def __init__(self, size: int, place: Place) -> None:
        super().__init__(size)
        self._place = place

    def spend(self, count: int) -> None:
        """See `Budget.spend`.

        Raises:
            ApiError: 429, all requests hold too many bytes.
        """
        super().spend(count)
        self._place.grow(count)


class Preparation:
    """Makes the model's inputs.

    Args:
        engine: the engine that prepares prompts.
        settings: limits.
        fetcher: downloads images.

    Attributes:
        context: maximum tokens of a prompt and its answer together; None for no limit.
    """

    def __init__(self, engine: Engine, settings: Settings, fetcher: Fetcher) -> None:
        self.engine, self.settings, self.fetcher = engine, settings, fetcher
        self.context = engine.context
        limits = [limit for limit in (settings.max_prompt_tokens, self.context) if limit is not None]
        self.max_prompt: int | None = min(limits) if limits else None
        # Each kind has its own threads, so that texts do not wait for images.
        self._texts, self._images = DaemonThreads(_THREADS, "texts"), DaemonThreads(_THREADS, "images")
        self._fetching = DaemonThreads(_FETCHING, "fetch")
        self._turns = Turns(_THREADS)  # of images

    def close(self) -> None:
        """End the threads; cancelled work is dropped."""
        self._texts.close(None)  # the size of texts is bounded, and so is their time
        for threads in (self._images, self._fetching):
            threads.close(_END_SECONDS)

    async def parse(self, function: Any, *arguments: Any) -> Any:
        """Run a short function on a thread for texts."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, function, *arguments)

    async def prompt(self, request: ChatRequest, place: Place) -> tuple[Prompt, int]:
        """Return a prompt with the model's inputs, and the maximum tokens of its answer.

        Images of a client wait for those of clients that have fewer in the making; see `Turns`.

        Cancellation ends the work before the next image. A decoder cannot be interrupted, but nothing waits for it.

        Raises:
            ApiError: 400 for an image that cannot be used or takes too long, or a prompt that is too long; 503 if
                other requests occupy all threads.
        """
        contents = await self._contents(request, place)
        threads = self._images if request.image_urls else self._texts
        loop = asyncio.get_running_loop()

        def begun() -> None:
            if not work.cancelled and not limit.expired():
                limit.reschedule(loop.time() + _SECONDS)

        work = _Work(lambda: loop.call_soon_threadsafe(begun))
        try:
            async with asyncio.timeout(_WAIT_SECONDS) as limit:
                with self._turn(place) if request.image_urls else contextlib.nullcontext() as turn:
                    if turn is not None:
                        await turn.given
                    return await loop.run_in_executor(threads, self._prepare, work, request, contents)
        except TimeoutError as error:
            raise work.too_slow() from error
        finally:
            work.cancelled = True

    @contextlib.contextmanager
    def _turn(self, place: Place) -> Iterator[Turn]:
        turn = self._turns.ask(place.client)
        try:
            yield turn
        finally:
            turn.end()

    async def _contents(self, request: ChatRequest, place: Place) -> list[bytes]:
        loop = asyncio.get_running_loop()
        remote = {index: image_url for index, image_url in enumerate(request.image_urls) if is_remote(image_url)}
        for image_url in remote.values():
            self.fetcher.check(image_url)
        budget = _Held(self.settings.max_body_bytes, place)
        tasks = [loop.run_in_executor(self._fetching, self.fetcher.fetch, one, budget) for one in remote.values()]
        # Two rounds: there may be as many others before it in the executor.
        patience = 2 * self.settings.fetch_timeout + 1
        try:
            # DNS lookups have no timeout, so the wait for them has one.
            fetched = dict(zip(remote, await asyncio.wait_for(asyncio.gather(*tasks), patience), strict=True))
        except TimeoutError as error:
            raise ApiError(
                400,
                "The images could not be downloaded in time.",
                code="invalid_image_url",
            ) from error
        return [fetched.get(index, b"") for index in range(len(request.image_urls))]

    def _prepare(self, work: _Work, request: ChatRequest, contents: list[bytes]) -> tuple[Prompt, int]:
        from jinja2 import TemplateError

        work.begin()
        texts = [part["text"] for message in request.messages for part in message["content"] if "text" in part]
        self._check_texts(texts)
        data = [content or data_of(image_url) for image_url, content in zip(request.image_urls, contents, strict=True)]
        images = iter(decode(request.image_urls, data, self.settings, work.check))
        conversation = [
            {
                "role": message["role"],
                "content": [
                    {"type": "image", "image": next(images)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in request.messages
        ]
        work.check()
        try:
            prompt = self.engine.prepare(conversation, literal=True, continue_last=request.continues)
        except PromptTooLong as error:
            self._max_tokens(request, error.tokens)
            raise
        except (ValueError, TemplateError) as error:
            raise ApiError(400, str(error), param="messages") from error
        return prompt, self._max_tokens(request, prompt.tokens)

    def _check_texts(self, texts: list[str]) -> None:
        """Refuse texts that are certainly too long before tokenization, and control tokens in texts."""
        size = sum(len(text.encode("utf-8")) for text in texts)
        if self.max_prompt is not None and size > self.max_prompt * _BYTES_OF_A_TOKEN:
            raise self._too_long(f"The messages have {size} bytes of text")
        if size > _MAX_TEXT_BYTES:
            raise ApiError(
                400,
                f"The messages have {size} bytes of text; this server accepts {_MAX_TEXT_BYTES}. Shorten them.",
                param="messages",
                code="context_length_exceeded",
            )
        if compat.SANITIZES_CONTROL_TOKENS:
            return
        tokenizer = self.engine.processor.tokenizer
        for token in tokenizer.added_tokens_encoder:
            if token.strip() and any(token in text for text in texts):
                message = f"A text has {token!r}, which is a control token of the model; spell it differently."
                raise ApiError(400, message, param="messages", code="control_token")

    def _too_long(self, what: str) -> ApiError:
        message = f"{what}; this server accepts prompts of up to {self.max_prompt} tokens. Shorten the conversation."
        return ApiError(400, message, param="messages", code="context_length_exceeded")

    def _max_tokens(self, request: ChatRequest, tokens: int) -> int:
        """Return the maximum tokens of the answer to a prompt with this many tokens."""
        if self.max_prompt is not None and tokens > self.max_prompt:
            raise self._too_long(f"The prompt has {tokens} tokens, images included")
        requested = request.max_tokens or self.settings.max_answer_tokens
        if self.context is None:
            return requested
        left = self.context - tokens
        if left < 1 or (request.max_tokens is not None and request.max_tokens > left):
            asked = f" and {request.max_tokens} for the answer" if request.max_tokens is not None else ""
            raise ApiError(
                400,
                f"The prompt has {tokens} tokens, images included,{asked} but the model's context is {self.context} "
                "for both. Shorten the conversation, or request a shorter answer.",
                param="messages",
                code="context_length_exceeded",
            )
        return min(requested, left)
