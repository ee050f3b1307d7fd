# SPDX-License-Identifier: Apache-2.0
"""FastVLM as a model of lmms-eval, registered as the entry point `fastvlm` in the group `lmms_eval.models`.

lmms-eval is imported on the first use of `FastVLM`.
"""

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint_identity import checkpoint_identity
from ..engines.base import Conversation, Sampling
from ..engines.engine import Engine
from ..engines.prompts import LITERAL, place_images
from ..engines.request import Request
from ..engines.requests_in_flight import as_ended
from ..images.opening_ahead import opened_one_ahead
from ..tokens import IMAGE_TOKEN
from .eval_journal import AnswerJournal, Journalled, answer_key

__all__ = ["FastVLM"]

if TYPE_CHECKING:
    FastVLM: Any

DEFAULT_MAX_NEW_TOKENS = 128
"""Limit for tasks that set none."""

_TIMED_PROMPTS = 7
_UNREADABLE = (OSError, ValueError, SyntaxError)  # what Pillow raises


class _Answering:
    """The implementation of `FastVLM`; `__getattr__` below adds lmms-eval's base class.

    Decoding is greedy; when an answer ends, the next question takes its place. Answers are cut at a task's stop strings
    (`until`) after generation. If a question has one `<image>` for each of its images, the images go there. Any other
    number of `<image>` is literal text, which reaches the model as `< image >`.

    Args:
        pretrained: directory or hub repository of a FastVLM checkpoint.
        engine: name of an engine, or a loaded engine.
        batch_size: questions that are answered at the same time.
        journal: path of a file that stores each finished answer; an evaluation with the same file resumes. None stores
            nothing.
        identity: JSON values that stored answers depend on besides the checkpoint, the task and the question. The
            default is the engine's name and its options.
        progress: called with the numbers of answered questions and of all questions.
        reading: called with the bytes read so far and of all files of the checkpoint, which are read for the journal.
        time_first_token: measure the time to the first token after all answers.
        **options: of the engine, such as `dtype`, `device` and `size`; see `transformers_fastvlm.engines`.

    Attributes:
        engine: the loaded engine.
        generate_seconds: the time from the first question to the last answer, with that of answers from the journal.
        reused_seconds: the part of `generate_seconds` that belongs to answers from the journal.
        reused: number of answers from the journal.
        first_token_seconds: the median time to the first token at batch size 1, over at most 7 prompts; or None.
        timing_seconds: the time spent on measuring `first_token_seconds`.

    Raises:
        ValueError: an option is unknown or invalid, there are several processes, or the checkpoint is not a FastVLM.
        ImportError: the engine's package is not installed.
        OSError: the checkpoint does not exist.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        engine: str | Engine = "transformers",
        batch_size: int | str = 16,
        journal: str | os.PathLike[str] | None = None,
        identity: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        reading: Callable[[int, int], None] = lambda done, total: None,
        time_first_token: bool = False,
        max_batch_size: Any = None,  # lmms-eval passes it to every model
        **options: Any,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the model fastvlm runs in one process; start only one."
            )
        try:
            self.batch_size = int(batch_size)
        except ValueError:
            self.batch_size = 0
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; expected a whole number of 1 or more.")
        if isinstance(options.get("size"), str):  # lmms-eval's command passes strings
            options["size"] = int(options["size"])
        name = engine if isinstance(engine, str) else type(engine).__name__
        if identity is None:
            identity = {"engine": name, **options}
        self._identity = {} if journal is None else {"files": checkpoint_identity(pretrained, reading), **identity}
        self._journal = None if journal is None else AnswerJournal(journal)
        self._progress, self._time_first_token = progress, time_first_token
        self.generate_seconds = self.reused_seconds = self.timing_seconds = 0.0
        self.reused = 0
        self._cleaned = False
        self._stamps_of: dict[tuple[str, str], Any] = {}
        self.first_token_seconds: float | None = None
        if isinstance(engine, str):
            from ..engines import load_engine

            batches = {} if engine == "onnx" else {"batch_size": self.batch_size}
            engine = load_engine(engine, pretrained, **batches, **options)
        self.engine: Engine = engine

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer lmms-eval's requests, in their order.

        Raises:
            ValueError: a row's image cannot be read, or a task needs an unsupported feature; the message names the task
                and the row.
        """
        from lmms_eval.api.instance import GenerationResult, TokenCounts

        keys, options = [], []
        for request in requests:
            text, _, chosen, doc_id, task, split = request.args
            options.append(_options(chosen, task))
            prompt = f"{text}{self._stamps(task, split)[doc_id]}"
            keys.append(answer_key(self._identity, task, doc_id, prompt, options[-1]))
        answers: dict[int, Journalled] = {}
        if self._journal is not None:
            answers = {at: found for at, key in enumerate(keys) if (found := self._journal.get(key)) is not None}
        self.reused += len(answers)
        self.reused_seconds += sum(answer.seconds for answer in answers.values())
        self._progress(len(answers), len(requests))
        self._answer_missing(requests, options, keys, answers)
        self.generate_seconds += sum(answer.seconds for answer in answers.values())
        if self._time_first_token and self.first_token_seconds is None and requests:
            start = time.perf_counter()
            self.first_token_seconds = self._first_token(requests[:_TIMED_PROMPTS])
            self.timing_seconds = time.perf_counter() - start
        results = []
        for at, chosen in enumerate(options):
            text = answers[at].text
            for end in chosen["until"]:
                text = text.split(end)[0]
            counts = TokenCounts(input_tokens=answers[at].prompt_tokens, output_tokens=answers[at].completion_tokens)
            results.append(GenerationResult(text=text, token_counts=counts))
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Refuse: likelihoods are not supported, only generated answers."""
        raise ValueError(
            f"task {requests[0].task_name} needs the likelihoods of given answers; the model fastvlm only generates "
            "answers. Choose a task whose output_type is generate_until."
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Refuse: several rounds are not supported."""
        raise ValueError(
            f"task {requests[0].task_name} has several rounds; the model fastvlm only supports one question and answer."
        )

    def clean(self) -> None:
        """Free the model's memory and close the journal; a second call does nothing."""
        if self._cleaned:
            return
        self._cleaned = True
        self.engine.close()
        if self._journal is not None:
            self._journal.close()

    def _answer_missing(
        self,
        requests: Sequence[Any],
        options: Sequence[dict[str, Any]],
        keys: Sequence[str],
        answers: dict[int, Journalled],
    ) -> None:
        """Answer the requests that have no answer, and add each answer as soon as it ends, to the journal too.

        Raises:
            ValueError: a row failed. Those that were asked before it are answered first.
        """
        batches = _batches(requests, options, answers, max(1, self.batch_size // 4))  # of images opened in one go
        failure: ValueError | None = None

        def asked() -> Iterator[tuple[int, Callable[[], Request]]]:
            nonlocal failure
            opened = opened_one_ahead(lambda batch: self._conversations([requests[at] for at in batch]), batches)
            with contextlib.closing(opened):
                try:
                    for batch, conversations in zip(batches, opened, strict=True):
                        for at, conversation in zip(batch, conversations, strict=True):
                            sampling = Sampling(max_new_tokens=options[at]["max_new_tokens"])
                            yield at, functools.partial(self.engine.stream, conversation, sampling)
                            if failure is not None:
                                return
                except ValueError as error:
                    failure = error

        before = time.perf_counter()
        with contextlib.closing(as_ended(asked(), self.batch_size, self.engine.batch_size)) as ended:
            for group in ended:
                now = time.perf_counter()
                seconds, before = (now - before) / len(group), now
                new: dict[int, Journalled] = {}
                for at, answer in group:
                    if isinstance(answer, ValueError):
                        _, _, _, doc_id, task, _ = requests[at].args
                        failure = ValueError(f"task {task}, row {doc_id}: {answer}")
                    else:
                        new[at] = Journalled(answer.text, answer.prompt_tokens, answer.completion_tokens, seconds)
                if new and self._journal is not None:
                    self._journal.append((keys[at], answer) for at, answer in new.items())
                answers.update(new)
                self._progress(len(answers), len(requests))
        if failure is not None:
            raise failure

    def _stamps(self, task: str, split: str) -> Any:
        """Return the image stamps of a task's rows; only custom data have them."""
        if (task, split) not in self._stamps_of:
            documents = self.task_dict[task][split]  # type: ignore[attr-defined]
            stamped = "stamp" in documents.column_names
            self._stamps_of[task, split] = documents["stamp"][:] if stamped else [""] * len(documents)
        return self._stamps_of[task, split]

    def _first_token(self, requests: Sequence[Any]) -> float:
        """Return the median seconds from a decoded image and its question to the first token."""
        seconds = []
        for request in (requests[0], *requests):  # the first request runs twice: once as a warm-up
            conversation = self._conversations([request])
            start = time.perf_counter()
            self.engine.generate(conversation, Sampling(max_new_tokens=1))
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])

    def _conversations(self, requests: Sequence[Any]) -> list[Conversation]:
        """Return the conversations of one task's requests, with decoded images."""
        _, _, _, _, task, split = requests[0].args
        table = self.task_dict[task][split]  # type: ignore[attr-defined]
        rows = [request.args[3] for request in requests]
        try:
            columns = table[rows]  # all at once: each call of `datasets` is slow
        except _UNREADABLE:
            columns = None  # one row failed; the loop finds it
        conversations = []
        for at, row in enumerate(rows):
            where = f"task {task}, row {row}"
            try:
                document = table[row] if columns is None else {name: values[at] for name, values in columns.items()}
                messages = requests[at].args[1](document)
            except _UNREADABLE as error:
                raise ValueError(f"{where} has an image that cannot be read: {error}") from error
            conversations.append(
                [{"role": message["role"], "content": _content(message["content"], where)} for message in messages]
            )
        return conversations


def _options(chosen: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the options of a task that are used."""
    if chosen.get("num_beams", 1) not in (None, 1) or chosen.get("do_sample"):
        raise ValueError(
            f"task {task} needs beam search or sampling ({dict(chosen)}); the model fastvlm only decodes greedily."
        )
    until = chosen.get("until") or []
    until = [until] if isinstance(until, str) else until
    return {
        "max_new_tokens": int(chosen.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS),
        "until": [end for end in until if end],
    }


def _batches(
    requests: Sequence[Any], options: Sequence[dict[str, Any]], done: Mapping[int, Any], size: int
) -> list[list[int]]:
    """Return the indices of unanswered requests, in batches with the same task and options and of similar length.

    The longest come first, so that an out-of-memory error appears at once.
    """
    groups: dict[tuple[str, str, int], list[int]] = {}
    for at, chosen in enumerate(options):
        if at not in done:
            _, _, _, _, task, split = requests[at].args
            groups.setdefault((task, split, chosen["max_new_tokens"]), []).append(at)
    batches = []
    for group in groups.values():
        group.sort(key=lambda at: (-len(str(requests[at].args[0])), at))
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def _content(parts: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """Return the parts of a message for an engine, with the images at the <image> placeholders of the question."""
    found = [_part(part, where) for part in parts]
    texts = [part["text"] for part in found if "text" in part]
    images = [part["image"] for part in found if "image" in part]
    if len(texts) == 1 and texts[0].count(IMAGE_TOKEN) == len(images):
        return place_images(texts[0], images)
    # The user cannot change a benchmark's questions, so <image> is literal text here instead of an error.
    return [part | {"text": part["text"].replace(IMAGE_TOKEN, LITERAL)} if "text" in part else part for part in found]


def _part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    from PIL import Image

    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    image = part.get("url")
    if part["type"] != "image" or not isinstance(image, Image.Image):
        raise ValueError(
            f"{where} has a part {part['type']!r} of type {type(image).__name__}; the model fastvlm accepts only "
            "text and decoded images."
        )
    return {"type": "image", "image": image}


@functools.cache
def _model_class() -> type:
    from lmms_eval.api.model import lmms

    body = {"__module__": __name__, "__doc__": _Answering.__doc__}
    return type("FastVLM", (_Answering, lmms), body)


def __getattr__(name: str) -> Any:
    if name == "FastVLM":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
