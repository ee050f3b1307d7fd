# SPDX-License-Identifier: Apache-2.0
"""The page's model and its running answers."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..engines import Engine, PromptTooLong, Request, Sampling

__all__ = ["Answerer", "Reply", "UnusableInput"]


class UnusableInput(ValueError):
    """A question that cannot be answered; the message tells the visitor why and what to do."""


class Reply:
    """A running answer.

    Attributes:
        text: the text so far, without special tokens and surrounding white space.
        stopped: whether `stop` was called.
    """

    def __init__(self, started: float | None = None) -> None:
        self.text, self.stopped = "", False
        self._started = time.perf_counter() if started is None else started
        self._request: Request | None = None
        self._error: Exception | None = None
        self._ended = False
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return self._ended or (self._request is not None and self._request.done)

    @property
    def first_token_seconds(self) -> float | None:
        """Seconds from the question to the first token, including the queue; None before."""
        first = None if self._request is None else self._request.first_at
        return None if first is None else first - self._started

    @property
    def encoded_images(self) -> int:
        """Number of images encoded for the answer."""
        answer = None if self._request is None else self._request.answer
        return answer.encoded_images or 0 if answer is not None else 0

    @property
    def has_images(self) -> bool:
        """Whether the conversation has images."""
        return self._request is not None and bool(self._request.prompt.image_tokens)

    @property
    def cut(self) -> bool:
        """Whether the answer was cut at the maximum length."""
        answer = None if self._request is None else self._request.answer
        return answer is not None and answer.finish_reason == "length"

    def stop(self) -> None:
        """Stop after the next token; the text so far is kept."""
        self.stopped = True
        if self._request is not None:
            self._request.cancel()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yield the text so far each time that it grows.

        Raises:
            UnusableInput: the conversation cannot be answered.
            Exception: any other error of the model.
        """
        done = False
        while not done:
            await self._news.wait()
            self._news.clear()
            done = self.done
            before = self.text
            while self._request is not None and self._request.pieces:
                self.text += self._request.pieces.popleft()
            if self.text != before:
                yield self.text
        error = self._error or (None if self._request is None else self._request.error)
        if error is not None:
            raise error

    # Called in other threads

    def begin(self, request: Request) -> None:
        """Set the engine's request."""
        self._request = request
        if self.stopped:
            request.cancel()
        self.tell()

    def end(self, error: Exception | None = None) -> None:
        """End without a request, after an error or a stop."""
        self._error, self._ended = error, True
        self.tell()

    def tell(self) -> None:
        """Wake the iteration, since the request has changed."""
        with contextlib.suppress(RuntimeError):  # the page was closed, and its event loop with it
            self._loop.call_soon_threadsafe(self._news.set)


class Answerer:
    """Asks an engine, in the order of the visitors' questions.

    Args:
        engine: the model; the caller closes it.
        max_new_tokens: maximum number of tokens of an answer.
        temperature: 0 for greedy decoding; above 0 samples.
    """

    def __init__(self, engine: Engine, max_new_tokens: int = 256, temperature: float = 0.0) -> None:
        self.engine, self.max_new_tokens, self.temperature = engine, max_new_tokens, temperature
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fastvlm-page")

    def ask(
        self,
        messages: list[dict[str, Any]],
        max_new_tokens: int | None = None,
        started: float | None = None,
    ) -> Reply:
        """Answer a conversation when its turn comes. Call it in an event loop, which the reply then belongs to.

        Args:
            messages: see `transformers_fastvlm.engines.Conversation`, the last one the user's.
            max_new_tokens: maximum number of tokens of the answer; None for the page's.
            started: `time.perf_counter()` when the question came; None for now.
        """
        reply = Reply(started)
        sampling = Sampling(max_new_tokens=max_new_tokens or self.max_new_tokens, temperature=self.temperature)
        self._thread.submit(self._begin, reply, messages, sampling)
        return reply

    def close(self) -> None:
        """Accept no more questions."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self, reply: Reply, messages: list[dict[str, Any]], sampling: Sampling) -> None:
        try:
            if reply.stopped:
                reply.end()
                return
            prompt = self._prompt(messages)
            (request,) = self.engine.submit(prompt, sampling, changed=reply.tell)
            reply.begin(request)
        except Exception as error:
            reply.end(error)

    def _prompt(self, messages: list[dict[str, Any]]) -> Any:
        try:
            return self.engine.prepare(messages)
        except PromptTooLong as error:
            raise UnusableInput(
                f"The conversation has become too long: with this question it has {error.tokens} tokens, and the model "
                f"reads {error.context}. Start a new one, or ask less at once."
            ) from error
        except ValueError as error:
            raise UnusableInput(str(error)) from error
