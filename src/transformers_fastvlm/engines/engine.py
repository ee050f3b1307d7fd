# SPDX-License-Identifier: Apache-2.0
"""The base class of engines: a queue of requests, and the only thread in which the model runs."""

import contextlib
import copy
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .base import GREEDY, Answer, Conversation, PromptTooLong, Sampling
from .grammars import Grammars
from .openmp import OpenMPThreads
from .prompts import LiteralTexts, Prompt, read_prompt
from .request import Request
from .requests_in_flight import as_ended
from .row_sampling import RowChooser

__all__ = ["Engine", "ended_engine"]

# Error of the device, such as a failed assertion in a kernel: the device is unusable afterwards.
_LOST_DEVICE = getattr(torch, "AcceleratorError", ())

logger = logging.getLogger(__name__)


class Engine:
    """A model that answers conversations. Its methods are thread-safe.

    The model runs in a separate thread, which the first request starts. A failed request does not affect others.

    Args:
        processor: the checkpoint's `FastVLMProcessor`.
        batch_size: maximum number of requests that are answered at the same time; None for no limit.
        max_images: maximum number of images in a conversation; None for no limit.

    Attributes:
        processor: as above.
        batch_seconds: moving average of the seconds that recent requests took.
    """

    _NAME = ""
    _BEAMS = False

    def __init__(self, processor: Any, batch_size: int | None, max_images: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
        self.processor, self.batch_size, self._max_images = processor, batch_size, max_images
        self._tokenizer = copy.deepcopy(processor.tokenizer)  # decodes while others encode with the processor's
        self._literal: LiteralTexts | None = None
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()  # they take a second for a large vocabulary, and the queue must not wait
        self._openmp = OpenMPThreads()
        self._queue: deque[Request] = deque()
        self._news = threading.Condition()
        self._closed = self._ended = False
        self._thread: threading.Thread | None = None
        self.batch_seconds = 1.0

    @property
    def context(self) -> int | None:
        """Maximum tokens of a conversation and its answer; None for no limit."""
        context: int | None = self.processor.context_length
        return context

    @property
    def device(self) -> str:
        """Device of the model, such as "cpu"."""
        raise NotImplementedError

    @property
    def dtype(self) -> str:
        """dtype of the model, such as "float32"."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Height and width, in pixels, that images are resized to."""
        return int(self.processor.image_processor.size["height"])

    @property
    def is_alive(self) -> bool:
        """Whether the engine answers requests: false after `close` or after a fatal error in the model's thread."""
        return not self._ended and not self._closed

    def generate(
        self, conversations: Sequence[Conversation], sampling: Sampling | Sequence[Sampling] = GREEDY
    ) -> list[Answer]:
        """Answer conversations; the answers have the same order.

        All conversations are checked, and their images decoded, before the model runs. The longest are answered
        first, so that an out-of-memory error appears at once.

        Args:
            conversations: see `Conversation`.
            sampling: one for all, or one for each. With one seed for all, the seed of each conversation is that seed
                plus its index.

        Raises:
            ValueError: a conversation has an image without a placeholder, a placeholder without an image, an unusable
                image, or fills the model's context; or this engine does not support `sampling`, or cannot enforce its
                schema. No conversation is answered then.
            ImportError: the package that enforces schemas is not installed.
        """
        samplings = _each(sampling, len(conversations))
        for one in set(samplings):
            self.check(one)
        several = len(conversations) > 1
        prompts = [
            self._read(conversation, where=f"Conversation {index}: " if several else "")
            for index, conversation in enumerate(conversations)
        ]
        longest_first = sorted(range(len(prompts)), key=lambda index: -prompts[index].tokens)
        asked = ((at, functools.partial(self._start, prompts[at], samplings[at])) for at in longest_first)
        answers: dict[int, Answer] = {}
        with contextlib.closing(as_ended(asked, self.batch_size)) as each:  # only few prompts keep pixel values
            for index, answer in itertools.chain.from_iterable(each):
                if isinstance(answer, ValueError):
                    raise answer
                answers[index] = answer
        return [answers[index] for index in range(len(prompts))]

    def stream(self, conversation: Conversation, sampling: Sampling = GREEDY) -> Request:
        """Start to answer a conversation: `prepare` and `submit` in one call.

        Returns:
            The request. Iterate over it for the text as it is generated; `result()` returns the complete answer.

        Raises:
            ValueError: as `generate`.
        """
        self.check(sampling)
        (request,) = self.submit(self.prepare(conversation), sampling)
        return request

    def prepare(self, conversation: Conversation, *, literal: bool = False, continue_last: bool = False) -> Prompt:
        """Check a conversation, decode its images and make the model's inputs, in the calling thread.

        Args:
            conversation: see `Conversation`.
            literal: treat control tokens in texts, `<image>` included, as plain text.
            continue_last: continue the last message, which is the assistant's, instead of answering it.

        Raises:
            PromptTooLong: the conversation fills the model's context.
            ValueError: as `generate`.
        """
        start = time.perf_counter()
        prompt = self._encoded(self._read(conversation, literal=literal, continue_last=continue_last))
        prompt.seconds = time.perf_counter() - start
        self._openmp.release()
        return prompt

    def submit(
        self,
        prompt: Prompt,
        *samplings: Sampling,
        changed: Callable[[], None] | None = None,
    ) -> list[Request]:
        """Queue a prompt, once for each sampling. It may be batched with other requests.

        Args:
            prompt: from `prepare`; several requests may share it.
            *samplings: options of each answer.
            changed: called on the engine's thread at each new text and at the end.

        Raises:
            ValueError: this engine does not support an option.
        """
        for sampling in samplings:
            self.check(sampling)
        requests = [self._request(prompt, sampling, changed) for sampling in samplings]
        self._enqueue(*requests)
        return requests

    def check(self, sampling: Sampling) -> None:
        """Check that this engine supports sampling options, without a conversation.

        Raises:
            ValueError: it lacks an option, or cannot enforce the schema.
            ImportError: the package that enforces schemas is not installed.
        """
        if sampling.num_beams > 1 and not self._BEAMS:
            raise ValueError(
                f"num_beams is {sampling.num_beams}, but the engine {self._NAME} has no beam search. Leave it out, or "
                "use the engine transformers."
            )
        last = self._vocabulary() - 1 if sampling.logit_bias else 0
        for token, _ in sampling.logit_bias:
            if not 0 <= token <= last:
                raise ValueError(f"logit_bias has token {token}; expected a token id from 0 to {last}.")
        if sampling.schema is not None:
            self._compiled().matcher(sampling.schema)

    def close(self) -> None:
        """Answer the queued requests, end the thread and free the memory; the engine cannot be used afterwards."""
        with self._news:
            self._closed = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    # For the engines

    def _vocabulary(self) -> int:
        """Return the number of the model's logits."""
        raise NotImplementedError

    def _compiled(self) -> Grammars:
        with self._grammars_lock:
            if self._grammars is None:
                self._grammars = Grammars(self.processor.tokenizer, self._ends(), self._vocabulary())
        return self._grammars

    def _chooser(self, request: Request) -> RowChooser:
        """Return a new token chooser for a request, and set it as the request's."""
        schema = request.sampling.schema
        matcher = None if schema is None else self._compiled().matcher(schema)
        request.chooser = RowChooser(request.sampling, matcher, self._ends())
        return request.chooser

    def _ends(self) -> set[int]:
        raise NotImplementedError

    def _encoded(self, prompt: Prompt) -> Prompt:
        """Make the model's inputs, in the calling thread."""
        return prompt

    def _answer(self, request: Request) -> None:
        """Answer a request on the engine's thread; `Request.take` gets each token."""
        raise NotImplementedError

    def _literal_texts(self) -> LiteralTexts:
        with self._news:
            if self._literal is None:
                self._literal = LiteralTexts(self.processor)
        return self._literal

    # The queue

    def _read(
        self, conversation: Conversation, *, literal: bool = False, continue_last: bool = False, where: str = ""
    ) -> Prompt:
        try:
            return read_prompt(
                self.processor,
                conversation,
                context=self.context,
                max_images=self._max_images,
                literal=self._literal_texts() if literal else None,
                continue_last=continue_last,
            )
        except PromptTooLong as error:
            error.args = (f"{where}{error}",)
            raise
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error

    def _request(
        self,
        prompt: Prompt,
        sampling: Sampling,
        changed: Callable[[], None] | None = None,
    ) -> Request:
        return Request(
            prompt,
            sampling,
            tokenizer=self._tokenizer,
            ends=self._ends(),
            context=self.context,
            changed=changed,
            on_cancel=self._leave,
        )

    def _start(self, prompt: Prompt, sampling: Sampling) -> Request:
        """Make the model's inputs of a checked prompt and queue it."""
        request = self._request(self._encoded(prompt), sampling)
        self._enqueue(request)
        return request

    def _enqueue(self, *requests: Request) -> None:
        """Append requests to the queue together; they fail at once if the thread has ended."""
        self._openmp.release()
        with self._news:
            for request in requests:
                request.queued_at = time.perf_counter()
            if self.is_alive:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="model", daemon=True)
                    self._thread.start()
                self._queue.extend(requests)
                self._news.notify()
                return
        for request in requests:
            request.end(ended_engine())

    def _leave(self, request: Request) -> None:
        with self._news:
            waits = request in self._queue
            if waits:
                self._queue.remove(request)
            self._news.notify()
        if waits:
            request.end()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException:
            logger.exception("the model's thread has ended; no more requests are answered")
        finally:
            with self._news:
                self._ended = True
                left = list(self._queue)
                self._queue.clear()
            for request in left:
                request.end(ended_engine())

    def _work(self) -> None:
        while request := self._next():
            request.start()
            self._answer_alone(request)
            del request  # do not keep it alive while this thread waits

    def _next(self) -> Request | None:
        """Wait for a request and take it out of the queue; return None at the end."""
        with self._news:
            while not self._queue and not self._closed:
                self._openmp.release()
                self._news.wait()
            return self._queue.popleft() if self._queue else None

    def _answer_alone(self, request: Request) -> None:
        request.begin()
        try:
            self._answer(request)
        except Exception as failure:
            logger.exception("a request failed")
            request.end(failure)
            self._recover(failure)
        except BaseException:
            request.end(ended_engine())
            raise
        else:
            request.end()
        self._measure(request)

    def _measure(self, request: Request) -> None:
        if request.answer is not None:
            self.batch_seconds += 0.2 * (request.answer.seconds.generate - self.batch_seconds)

    def _recover(self, failure: Exception) -> None:
        """Free what a failed step of the model holds; raise the error if later requests would fail too."""
        if isinstance(failure, _LOST_DEVICE):
            raise failure
        failure.__traceback__ = None  # it would keep the step's tensors alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def ended_engine() -> RuntimeError:
    """Return the error of requests that the model's thread leaves unanswered."""
    return RuntimeError("the model's thread has ended")


def _each(sampling: Sampling | Sequence[Sampling], count: int) -> list[Sampling]:
    """Return the sampling of each conversation; with one seed for all, conversation i has that seed plus i."""
    if not isinstance(sampling, Sampling):
        if len(sampling) != count:
            raise ValueError(f"there are {len(sampling)} samplings for {count} conversations; give one for each.")
        return list(sampling)
    return [sampling.of_row(index) for index in range(count)]
