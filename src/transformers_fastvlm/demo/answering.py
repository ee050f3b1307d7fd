# SPDX-License-Identifier: Apache-2.0
"""The one model behind the page: answers one conversation at a time, in the order in which they were asked."""

import asyncio
import contextlib
import copy
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextStreamer

from ..inference import PromptCache

__all__ = ["Answerer", "Reply", "UnusableInput"]

KEPT_PROMPTS = 4
"""Conversations whose keys and values stay in the model's memory; a question in an older one is prefilled anew."""


class UnusableInput(ValueError):
    """What a visitor asked cannot be answered; the message tells the visitor why and what to do."""


class Reply:
    """An answer on its way.

    Attributes:
        text: what there is of it so far; at the end all of it, without special tokens and surrounding white space.
        first_token_seconds: from the question to the first token, waiting for others included; None before.
        encoded_images: pictures that had to be encoded for it.
        has_pictures: whether the conversation has any.
        cut: whether it was ended by the longest length that is allowed.
    """

    def __init__(self, started: float | None = None) -> None:
        self.text = ""
        self.first_token_seconds: float | None = None
        self.encoded_images = 0
        self.has_pictures = False
        self.cut = False
        self._started = time.perf_counter() if started is None else started
        self._stopping = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._done.is_set()

    @property
    def stopped(self) -> bool:
        """Whether it was asked to stop."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """End after the next token; what there is by then stays."""
        self._stopping.set()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yield the text so far each time that it grows.

        Raises:
            UnusableInput: the conversation cannot be answered.
            Exception: whatever else the model raised.
        """
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            self.text += piece
            yield self.text.strip()
        self.text = self.text.strip()

    def _see_token(self) -> None:
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self._started

    def _put(self, piece: str | BaseException | None) -> None:
        """Hand a piece over from the model's thread; None and an error end the answer."""
        if not isinstance(piece, str):
            self._done.set()  # first: who sees the end may ask again at once
        with contextlib.suppress(RuntimeError):  # the page was closed, and its event loop with it
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class Answerer:
    """Answers conversations with one model, one after the other, in a thread of its own.

    Args:
        model: `FastVLMForConditionalGeneration`.
        processor: its `FastVLMProcessor`.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token; above 0 samples.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int = 256, temperature: float = 0.0) -> None:
        self.model, self.max_new_tokens = model, max_new_tokens
        # The length is checked here, so that a visitor is told in terms of the page.
        self.context = processor.context_length
        self.processor = copy.copy(processor)
        self.processor.context_length = None
        self._config_before = model.generation_config
        model.generation_config = config = copy.deepcopy(model.generation_config)
        config.do_sample = temperature > 0
        config.temperature = temperature if config.do_sample else None
        if not config.do_sample:
            config.top_p = config.top_k = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fastvlm-model")
        self._kept: list[PromptCache] = []

    def new_cache(self) -> PromptCache:
        """Return what remembers one visitor's conversation between questions."""
        return PromptCache(self.model, self.processor)

    def ask(
        self,
        messages: list[dict[str, Any]],
        cache: PromptCache | None = None,
        max_new_tokens: int | None = None,
        started: float | None = None,
    ) -> Reply:
        """Answer a conversation when its turn comes. Call it in an event loop, which the reply then belongs to.

        Args:
            messages: as `FastVLMProcessor.apply_chat_template` takes them, the last one the user's.
            cache: of `new_cache`; None remembers nothing.
            max_new_tokens: longest answer; None for the page's.
            started: `time.perf_counter()` when the question came; None for now.
        """
        reply = Reply(started)
        self._thread.submit(self._run, reply, messages, cache, max_new_tokens or self.max_new_tokens)
        return reply

    def forget(self, cache: PromptCache) -> None:
        """Free what a cache holds, once nothing uses it any more."""
        with contextlib.suppress(RuntimeError):  # closed already
            self._thread.submit(self._drop, cache)

    def close(self) -> None:
        """Take no more questions, and wait for the one that is being answered."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.model.generation_config = self._config_before

    # In the model's thread

    def _run(self, reply: Reply, messages: list[dict[str, Any]], cache: PromptCache | None, limit: int) -> None:
        try:
            if not reply.stopped:
                if cache is not None:
                    self._keep(cache)
                self._generate(reply, messages, cache or self.new_cache(), limit)
        except Exception as error:
            reply._put(error)
        finally:
            reply._put(None)

    def _generate(self, reply: Reply, messages: list[dict[str, Any]], cache: PromptCache, limit: int) -> None:
        try:
            inputs = cache.prepare(messages)
        except ValueError as error:
            raise UnusableInput(str(error)) from error
        length = inputs["input_ids"].shape[1]
        room = limit if self.context is None else min(limit, self.context - length)
        if room < 1:
            raise UnusableInput(
                f"The conversation has become too long: with this question it has {length} tokens, and the model reads "
                f"{self.context}. Start a new one, or ask less at once."
            )
        output = cache.generate(
            **inputs,
            max_new_tokens=room,
            streamer=_Streamer(self.processor.tokenizer, reply),
            stopping_criteria=StoppingCriteriaList([_Stop(reply)]),
        )
        reply.encoded_images, reply.has_pictures = cache.encoded_images, "pixel_values" in inputs
        ends = self.model.generation_config.eos_token_id
        last = int(output[0, -1])
        reply.cut = not reply.stopped and last not in (ends if isinstance(ends, list) else [ends])

    def _keep(self, cache: PromptCache) -> None:
        """Make a cache the newest, and empty those that are too many."""
        self._kept = [one for one in self._kept if one is not cache] + [cache]
        for old in self._kept[:-KEPT_PROMPTS]:
            old.reset()
        self._kept = self._kept[-KEPT_PROMPTS:]

    def _drop(self, cache: PromptCache) -> None:
        cache.reset()
        self._kept = [one for one in self._kept if one is not cache]


class _Streamer(TextStreamer):
    """Passes words on as they are complete, and notes when the first token came."""

    def __init__(self, tokenizer: Any, reply: Reply) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._reply = reply

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self._reply._see_token()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._reply._put(text)


class _Stop:
    """Ends generation when a reply is stopped."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._reply.stopped, dtype=torch.bool, device=input_ids.device)
