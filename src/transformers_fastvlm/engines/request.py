# SPDX-License-Identifier: Apache-2.0
"""A running request: decides where the answer ends, and when its text can be passed on."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from .answer_text import AnswerText
from .base import Answer, FinishReason, Sampling, Seconds, TokenLogprob
from .prompts import Prompt
from .row_sampling import RowChooser

__all__ = ["PATIENCE", "Request"]

PATIENCE = 0.2
"""Seconds between two checks of a waiting thread: on Windows, Ctrl-C does not interrupt one that waits for a lock."""

logger = logging.getLogger(__name__)


class Request:
    """A prompt, its sampling options and its answer so far. Iterate over it for the text as it is generated.

    Args:
        prompt, sampling, changed: see `Engine.submit`.
        tokenizer: decodes tokens.
        ends: tokens that end an answer.
        context: maximum tokens of prompt and answer.
        on_cancel: called with this request when it is cancelled.

    Attributes:
        pieces: parts of the text that were not read yet; together never more than the answer.
        tokens: number of tokens of the answer so far.
        cancelled: whether the request was cancelled.
        done: whether the answer has ended. Read it before `pieces`, so that the last part is not missed.
        error: the error, if there is no answer.
        answer: the complete answer, after its end.
        queued_at, begun_at, first_at, ended_at: `time.perf_counter()` when the request was queued, at the start of the
            model, at the first token and at the end; None before.
        cached_tokens, encoded_images: see `Answer`.
        logprobs: see `Answer`, so far.
        chooser: chooses the tokens, if the engine does not do this itself. It knows whether an answer is complete by
            its schema, and why it could not continue.

    Example:
        >>> request = engine.stream(conversation)  # doctest: +SKIP
        >>> for piece in request:  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
        >>> request.result().finish_reason  # doctest: +SKIP
    """

    def __init__(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        tokenizer: Any,
        ends: Collection[int],
        context: int | None = None,
        changed: Callable[[], None] | None = None,
        on_cancel: Callable[["Request"], None] = lambda request: None,
    ) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.max_tokens = min(sampling.max_new_tokens, context - prompt.tokens if context else sampling.max_new_tokens)
        self._tokenizer, self._ends, self._changed, self._on_cancel = tokenizer, ends, changed, on_cancel
        self._news = threading.Condition()
        self.queued_at = time.perf_counter()
        self.begun_at: float | None = None
        self.first_at: float | None = None
        self.ended_at: float | None = None
        self.pieces: deque[str] = deque()
        self.cancelled = self.done = False
        self.error: BaseException | None = None
        self.answer: Answer | None = None
        self._when_done: Callable[[], None] | None = None
        self._said = ""
        self.begin()

    def __iter__(self) -> Iterator[str]:
        """Yield the answer's text in parts, as it is generated.

        Raises:
            Exception: the error that ended the answer.
        """
        done = False
        while not done:
            self._wait_for(lambda: self.done or bool(self.pieces))
            done = self.done
            while self.pieces:
                yield self.pieces.popleft()
        if self.error is not None:
            raise self.error

    def result(self) -> Answer:
        """Wait for the complete answer and return it.

        Raises:
            Exception: the error that ended the answer.
        """
        self._wait_for(lambda: self.done)
        if self.answer is None:
            raise self.error or RuntimeError("the request has ended without an answer.")
        return self.answer

    @property
    def waited(self) -> float:
        """Seconds in the queue, so far."""
        return (self.begun_at or self.ended_at or time.perf_counter()) - self.queued_at

    def cancel(self) -> None:
        """End the answer: immediately if it is still queued, else at the next token. The text so far is kept."""
        self.cancelled = True
        self._on_cancel(self)

    def when_done(self, call: Callable[[], None]) -> None:
        """Have a function called at the end of the answer, on the engine's thread; at once if it has ended."""
        with self._news:
            if not self.done:
                self._when_done = call
                return
        call()

    # For engines

    def start(self) -> None:
        """Record that the model starts with this request."""
        self.begun_at = time.perf_counter()

    def begin(self) -> None:
        """Start the answer, or restart it after a failure; text that was passed on is not repeated."""
        self.tokens, self.cached_tokens = 0, 0
        self.encoded_images: int | None = None
        self._text = ""
        self._reason: FinishReason | None = None
        self._decoding = AnswerText(self._tokenizer, self.sampling.stop, continues=self.prompt.continues)
        self.chooser: RowChooser | None = None
        self.logprobs: list[TokenLogprob] = []

    def take(self, token: int) -> bool:
        """Take the next token; return whether the answer has ended."""
        if self._reason is not None or self.cancelled or (self.chooser and self.chooser.error):
            return True
        if self.first_at is None:
            self.first_at = time.perf_counter()
        self.tokens += 1
        if self.chooser and self.chooser.logprobs is not None:
            self.note_logprob(token, *self.chooser.logprobs)
        if token in self._ends:
            self._reason = "stop"
        else:
            self._say(self._decoding.add(token))
            if self._decoding.stopped or (self.chooser and self.chooser.complete):
                self._reason = "stop"
            elif self.tokens >= self.max_tokens:
                self._reason = "length"
        return self._reason is not None

    def note_logprob(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> None:
        """Record the logprobs of a token of the answer and of the most probable tokens at its position."""
        others = tuple(TokenLogprob(other, self._text_of(other), value) for other, value in top)
        self.logprobs.append(TokenLogprob(token, self._text_of(token), logprob, others))

    def end(self, error: BaseException | None = None, reason: FinishReason = "length") -> None:
        """End the request with an error, with the finish reason that `take` found, or else with `reason`."""
        self.ended_at = time.perf_counter()
        if error is None and self.chooser:
            error = self.chooser.error
        if error is None:
            try:
                self._say(self._decoding.finish())
            except RuntimeError as failure:
                error = failure
        if error is None:
            if self._decoding.stopped:
                self._reason = "stop"
            self.answer = self._whole(self._reason or ("cancelled" if self.cancelled else reason))
        self.error, self.done = error, True
        self._tell()
        if self._when_done is not None:
            self._when_done()

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self._news:
            while not self._news.wait_for(condition, PATIENCE):
                pass

    def _whole(self, reason: FinishReason) -> Answer:
        ended = self.ended_at or time.perf_counter()
        begun = self.begun_at or ended
        return Answer(
            text=self._text,
            finish_reason=reason,
            prompt_tokens=self.prompt.tokens,
            image_tokens=sum(self.prompt.image_tokens),
            completion_tokens=self.tokens,
            cached_tokens=self.cached_tokens,
            encoded_images=self.encoded_images,
            seconds=Seconds(
                prepare=self.prompt.seconds,
                wait=self.waited,
                first_token=None if self.first_at is None or self.sampling.num_beams > 1 else self.first_at - begun,
                generate=ended - begun,
            ),
            logprobs=None if self.sampling.logprobs is None else tuple(self.logprobs),
        )

    def _text_of(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _say(self, piece: str) -> None:
        self._text += piece
        length = min(len(self._said), len(self._text))
        if self._text[:length] != self._said[:length]:
            raise RuntimeError("the answer differs from the text that was already passed on in a batch")
        if len(self._text) > len(self._said):
            self.pieces.append(self._text[len(self._said) :])
            self._said = self._text
            self._tell()

    def _tell(self) -> None:
        """Wake waiting threads. If `changed` raises, the request is cancelled; all others continue."""
        with self._news:
            self._news.notify_all()
        if self._changed is not None:
            try:
                self._changed()
            except Exception:
                logger.exception("a request's listener failed")
                self.cancelled = True
