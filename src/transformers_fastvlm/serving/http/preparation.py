# SPDX-License-Identifier: Apache-2.0
"""From a request to the model's inputs, on threads beside the model's."""

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ... import compat
from .errors import ApiError
from .fetching import Budget, Fetcher
from .images import data_of, decode, is_remote
from .protocol import ChatRequest
from .settings import Settings

__all__ = ["Preparation"]

_FETCHING = 16
_DECODING = 2
_BYTES_OF_A_TOKEN = 16
_MAX_TEXT_BYTES = 2**20  # of a request's texts together, where the model has no context that would bound them


class Preparation:
    """Makes the model's inputs.

    Args:
        processor: `FastVLMProcessor`; its own settings are not changed.
        settings: limits.
        fetcher: where pictures with an address come from.

    Attributes:
        context: most tokens of a prompt and its answer together; None where the model has no limit.
    """

    def __init__(self, processor: Any, settings: Settings, fetcher: Fetcher) -> None:
        self.settings, self.fetcher = settings, fetcher
        self.context: int | None = processor.context_length
        limits = [limit for limit in (settings.max_prompt_tokens, self.context) if limit is not None]
        self.max_prompt: int | None = min(limits) if limits else None
        self._processor = copy.copy(processor)
        self._processor.context_length = None  # checked here, for an error of the API
        self._lock = threading.Lock()  # a tokenizer's settings change while it encodes
        self._fetching = ThreadPoolExecutor(_FETCHING, "fetch")
        self._decoding = ThreadPoolExecutor(_DECODING, "prepare")

    async def parse(self, function: Any, *arguments: Any) -> Any:
        """Run something that takes time on a thread for it."""
        return await asyncio.get_running_loop().run_in_executor(self._decoding, function, *arguments)

    async def inputs(self, request: ChatRequest) -> tuple[dict[str, Any], int]:
        """Return a prompt as the model takes it, on the CPU, and the most tokens that its answer may have.

        Raises:
            ApiError: 400 for a picture that cannot be used, or a prompt that is too long.
        """
        contents = await self._contents(request)
        return await self.parse(self._prepare, request, contents)

    async def _contents(self, request: ChatRequest) -> list[bytes]:
        """Return the bytes of the pictures."""
        loop = asyncio.get_running_loop()
        remote = {index: picture for index, picture in enumerate(request.pictures) if is_remote(picture)}
        for picture in remote.values():
            self.fetcher.check(picture)
        budget = Budget(self.settings.max_body_bytes)
        tasks = [loop.run_in_executor(self._fetching, self.fetcher.fetch, one, budget) for one in remote.values()]
        try:
            # Looking up a name has no time-out of its own; waiting for it has.
            fetched = dict(zip(remote, await asyncio.wait_for(asyncio.gather(*tasks), self._patience), strict=True))
        except TimeoutError as error:
            raise ApiError(400, "The pictures could not be fetched in time.", code="invalid_image_url") from error
        return [fetched.get(index, b"") for index in range(len(request.pictures))]

    @property
    def _patience(self) -> float:
        # Two rounds: there may be as many others before it in the executor.
        return 2 * self.settings.fetch_timeout + 1

    def _prepare(self, request: ChatRequest, contents: list[bytes]) -> tuple[dict[str, Any], int]:
        from jinja2 import TemplateError

        texts = [part["text"] for message in request.messages for part in message["content"] if "text" in part]
        self._check_texts(texts)
        data = [content or data_of(picture) for picture, content in zip(request.pictures, contents, strict=True)]
        images = iter(decode(request.pictures, data, self.settings.max_pixels, self.settings.do_exif_transpose))
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
        options: dict[str, Any] = {"sanitize_control_tokens": True} if compat.SANITIZES_CONTROL_TOKENS else {}
        try:
            with self._lock:
                inputs = self._processor.apply_chat_template(
                    conversation,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    **options,
                )
        except (ValueError, TemplateError) as error:
            raise ApiError(400, str(error), param="messages") from error
        return dict(inputs), self._room(request, inputs["input_ids"].shape[1])

    def _check_texts(self, texts: list[str]) -> None:
        """Refuse what is certainly too long before it is tokenized, and control tokens where they cannot be text."""
        size = sum(len(text.encode("utf-8")) for text in texts)
        if self.max_prompt is not None and size > self.max_prompt * _BYTES_OF_A_TOKEN:
            raise self._too_long(f"The messages have {size} bytes of text")
        if size > _MAX_TEXT_BYTES:
            raise ApiError(
                400,
                f"The messages have {size} bytes of text; this server takes {_MAX_TEXT_BYTES}. Shorten them.",
                param="messages",
                code="context_length_exceeded",
            )
        if compat.SANITIZES_CONTROL_TOKENS:
            return
        tokenizer = self._processor.tokenizer
        for token in tokenizer.added_tokens_encoder:
            if token.strip() and any(token in text for text in texts):
                message = f"A text has {token!r}, which is a control token of the model; write it otherwise."
                raise ApiError(400, message, param="messages", code="control_token")

    def _too_long(self, what: str) -> ApiError:
        message = f"{what}; this server takes prompts of up to {self.max_prompt} tokens. Shorten the conversation."
        return ApiError(400, message, param="messages", code="context_length_exceeded")

    def _room(self, request: ChatRequest, tokens: int) -> int:
        """Return the most tokens of the answer to a prompt of this many."""
        if self.max_prompt is not None and tokens > self.max_prompt:
            raise self._too_long(f"The prompt has {tokens} tokens, those of images included")
        wanted = request.max_tokens or self.settings.max_answer_tokens
        if self.context is None:
            return wanted
        room = self.context - tokens
        if room < 1 or (request.max_tokens is not None and request.max_tokens > room):
            asked = f" and {request.max_tokens} for the answer" if request.max_tokens is not None else ""
            raise ApiError(
                400,
                f"The prompt has {tokens} tokens, those of images included,{asked} but the model's context holds "
                f"{self.context} for both. Shorten the conversation, or ask for a shorter answer.",
                param="messages",
                code="context_length_exceeded",
            )
        return min(wanted, room)
