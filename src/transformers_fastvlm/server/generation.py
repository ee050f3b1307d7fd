# SPDX-License-Identifier: Apache-2.0
"""The model's thread: takes prompts from a queue, one or several at a time, and answers token by token."""

import copy
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ..engines.answer_text import AnswerText
from ..inference import PromptCache

__all__ = ["Job", "Worker"]

# An error of the device itself, such as a failed assertion in a kernel: nothing can be computed there any more.
_LOST_DEVICE = getattr(torch, "AcceleratorError", ())

logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Job:
    """A prompt and how it is to be answered; the worker fills in the rest.

    Args:
        inputs: of the model, for this prompt alone, on the CPU.
        max_tokens: at which an answer is cut.
        temperature, top_p, seed: as in the API; temperature 0 is greedy.
        rows: answers wanted. One for greedy ones, which are all the same.
        stop: texts at which an answer ends.
        changed: called on the worker's thread when there is something new: pieces where `stream`, or the end.
        stream: whether pieces are wanted as they come.

    Attributes:
        cancelled: set by whoever no longer wants the answer; its work ends at the next token.
        answers: of each row.
        pieces: (row, text) not taken yet. At most the whole answers.
        error: what went wrong.
        done: whether nothing more will come.
        waited: seconds in the queue.
    """

    inputs: dict[str, Tensor]
    max_tokens: int
    changed: Callable[[], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    rows: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    cancelled: bool = False
    answers: list["Row"] = field(default_factory=list)
    pieces: deque[tuple[int, str]] = field(default_factory=deque)
    error: BaseException | None = None
    done: bool = False
    waited: float = 0.0
    queued_at: float = field(default_factory=time.monotonic)

    @property
    def prompt_tokens(self) -> int:
        return int(self.inputs["input_ids"].shape[1])

    @property
    def images(self) -> int:
        return len(self.inputs.get("num_tiles", self.inputs.get("pixel_values", ())))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def end(self, error: BaseException | None = None) -> None:
        """Say that nothing more will come."""
        self.error, self.done = error, True
        self.tell()

    def tell(self) -> None:
        """Call `changed`. Where that raises, nobody listens any more; the model's thread and others go on."""
        try:
            self.changed()
        except Exception:
            logger.exception("a request's listener failed")
            self.cancelled = True


class Row:
    """One answer that is being made, for as long as its job exists.

    Attributes:
        text: of it, so far.
        tokens: their number, that which ended it included.
        reason: "stop" or "length"; None while it goes on, and where nobody wanted the rest.

    Args:
        before: text that an earlier attempt handed out as pieces; this one has to begin with it.
    """

    def __init__(self, job: Job, index: int, tokenizer: Any, ends: frozenset[int], before: str = "") -> None:
        # A cycle of the two would keep the prompt's pictures until Python happens to look for cycles.
        self.job: Job = weakref.proxy(job)
        self.index, self._ends = index, ends
        self._decoding = AnswerText(tokenizer, job.stop)
        self._before, self._said = before, len(before)
        self.text, self.tokens = "", 0
        self.reason: str | None = None

    def take(self, token: int) -> bool:
        """Take the next token; return whether this answer is at its end."""
        if self.reason is not None or self.job.cancelled:
            return True
        self.tokens += 1
        if token in self._ends:
            self.reason = "stop"
        else:
            self._say(self._decoding.add(token))
            if self._decoding.stopped:
                self.reason = "stop"
            elif self.tokens >= self.job.max_tokens:
                self.reason = "length"
        if self.reason is not None:
            self._say(self._decoding.finish())
            if self._decoding.stopped:
                self.reason = "stop"
        return self.reason is not None

    def _say(self, piece: str) -> None:
        self.text += piece
        length = min(len(self._before), len(self.text))
        if self.text[:length] != self._before[:length]:
            raise RuntimeError("the answer alone is not the one that was begun together with others")
        if self.job.stream and len(self.text) > self._said:
            self.job.pieces.append((self.index, self.text[self._said :]))
            self._said = len(self.text)
            self.job.tell()


class _Watch(StoppingCriteria):
    """Passes each new token on, and ends each row by itself."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Return for each row whether it is at its end, (rows,)."""
        ended = [row.take(token) for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True)]
        return torch.tensor(ended, device=input_ids.device)


class Worker:
    """A model and the one thread that uses it.

    Waiting greedy requests are answered together, each ending by itself; their tokens are those of single answers, but
    that sums in another order differ in their last bits. Requests that sample are answered one at a time, since they
    share a generator of random numbers. A request that is alone reuses what its prompt has in common with the last
    such one (`PromptCache`). Where answering several fails, each is answered alone, so that none fails for another.

    Args:
        model: `FastVLMForConditionalGeneration`, on its device, for this worker alone.
        processor: its `FastVLMProcessor`.
        batch_size: most requests that are answered together.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self._tokenizer = copy.deepcopy(processor.tokenizer)  # others encode with the processor's meanwhile
        self._cache = PromptCache(model, processor)
        config = copy.deepcopy(model.generation_config)
        ends = config.eos_token_id
        self._ends = frozenset(() if ends is None else ends if isinstance(ends, list) else [ends])
        if config.pad_token_id is None:
            config.pad_token_id = processor.tokenizer.pad_token_id or next(iter(self._ends), 0)
        config.num_beams, config.max_length = 1, None
        self._config = config
        self._queue: deque[Job] = deque()
        self._news = threading.Condition()
        self._closed = self._ended = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.batch_seconds = 1.0  # of a batch, as a moving average

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether jobs are answered. The thread ends by `close`, or by what no request may be the reason of."""
        return self._thread.is_alive() and not self._ended

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue; it fails at once where the thread has ended."""
        with self._news:
            if not self._ended:
                self._queue.append(job)
                self._news.notify()
                return
        job.end(_ended())

    def cancel(self, job: Job) -> None:
        """Leave a job undone: at once if it waits, at the next token if it runs."""
        job.cancelled = True
        with self._news:
            if job in self._queue:
                self._queue.remove(job)

    def close(self) -> None:
        """End the thread after what is queued, and wait for it."""
        with self._news:
            self._closed = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        before = self.model.generation_config
        try:
            while jobs := self._next():
                start = time.monotonic()
                try:
                    self._answer_or_fail(jobs)
                finally:
                    for job in jobs:
                        if not job.done:
                            job.end(_ended())
                self.batch_seconds += 0.2 * (time.monotonic() - start - self.batch_seconds)
                del jobs, job  # nothing of them is kept while this thread waits
        except BaseException:
            logger.exception("the model's thread has ended; no request is answered any more")
        finally:
            with self._news:
                self._ended = True
                left = list(self._queue)
                self._queue.clear()
            for job in left:
                job.end(_ended())
            self.model.generation_config = before

    def _answer_or_fail(self, jobs: list[Job]) -> None:
        """Answer jobs together, and each alone where that fails."""
        error = self._attempt(jobs)
        if error is None or len(jobs) == 1:
            for job in jobs:
                job.end(error)
            return
        for job in jobs:
            job.end(None if job.cancelled else self._attempt([job]))

    def _attempt(self, jobs: list[Job]) -> Exception | None:
        """Answer jobs; return what went wrong."""
        try:
            self._answer(jobs)
        except Exception as failure:
            logger.exception("%d requests failed", len(jobs))
            if isinstance(failure, _LOST_DEVICE):
                raise  # what comes after it would fail too
            failure.__traceback__ = None  # would keep the tensors of the failed batch
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return failure
        return None

    def _next(self) -> list[Job]:
        """Wait for jobs and return those to be answered together; none at the end."""
        with self._news:
            while not self._queue and not self._closed:
                self._news.wait()
            if not self._queue:
                return []
            jobs = [self._queue.popleft()]
            if jobs[0].is_greedy:
                room = self.batch_size - jobs[0].images  # images are encoded at once, so they are bounded too
                for job in [job for job in self._queue if job.is_greedy]:
                    if len(jobs) == self.batch_size or job.images > room:
                        break
                    room -= job.images
                    jobs.append(job)
                    self._queue.remove(job)
        now = time.monotonic()
        for job in jobs:
            job.waited = now - job.queued_at
        return jobs

    def _answer(self, jobs: list[Job]) -> None:
        rows = []
        for job in jobs:
            said = [row.text if job.stream else "" for row in job.answers] or [""] * job.rows
            job.answers = [Row(job, index, self._tokenizer, self._ends, text) for index, text in enumerate(said)]
            rows += job.answers
        first = jobs[0]
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=not first.is_greedy):
            self._choose(first)
            self._generate(jobs, rows)

    def _generate(self, jobs: list[Job], rows: list[Row]) -> None:
        first = jobs[0]
        options: dict[str, Any] = {
            "max_new_tokens": max(job.max_tokens for job in jobs),
            "stopping_criteria": StoppingCriteriaList([_Watch(rows)]),
        }
        if len(jobs) == 1:
            options["num_return_sequences"] = first.rows
            self._cache.generate(**self._on_device(first.inputs), **options)
        else:
            inputs = _together([job.inputs for job in jobs], self._config.pad_token_id)
            self.model.generate(**self._on_device(inputs), **options)

    def _on_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def _choose(self, job: Job) -> None:
        """Set how tokens are chosen.

        Set on the model: generate() takes a None as "not given", and falls back to what the model has.
        """
        config = copy.deepcopy(self._config)
        config.do_sample = not job.is_greedy
        if job.is_greedy:
            config.temperature = config.top_p = config.top_k = None
        else:
            config.temperature, config.top_p = job.temperature, job.top_p
            config.top_k = config.top_k or 0  # for None generate() would take 50
            torch.seed() if job.seed is None else torch.manual_seed(job.seed)
        self.model.generation_config = config


def _ended() -> RuntimeError:
    return RuntimeError("the model's thread has ended")


def _together(prompts: Sequence[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Return a batch of prompts, padded on the left; pictures stand one after the other."""
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        own = prompt["input_ids"][0]
        ids[row, length - len(own) :] = own
        mask[row, length - len(own) :] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    for name in ("pixel_values", "image_sizes", "num_tiles"):
        parts = [prompt[name] for prompt in prompts if name in prompt]
        if parts:
            batch[name] = torch.cat(parts)
    return batch
