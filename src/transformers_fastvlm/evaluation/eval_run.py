# SPDX-License-Identifier: Apache-2.0
"""An evaluation from its tasks to its results: lmms-eval asks and scores, the model `fastvlm` answers."""

import argparse
import contextlib
import functools
import importlib.metadata
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from PIL import Image, ImageFile

from .. import __version__
from ..images.read_options import WHITE, Colour, ReadOptions
from ..images.reading import pil_to_rgb
from ..random_streams import kept_random_streams
from ..storage.atomic_files import replacing
from .own_data import own_task, read_own_data
from .results import IMAGES, EvaluationRun, Sample, TaskResult, write_run
from .tasks import expand, import_harness, load_task, main_metric, right_answers

__all__ = ["JOURNAL", "LOG", "EvaluationOptions", "evaluate"]

JOURNAL, LOG = "journal.jsonl", "harness.log"

_IMAGES_OF_TASK = 200
_LARGEST_SIDE = 512  # of their copies, in pixels
_READING = ("do_exif_transpose", "alpha_background", "max_pixels")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of an evaluation.

    Args:
        tasks: names of lmms-eval's tasks or groups, or "card"; empty if `data` is given.
        include: folder with YAML files of further lmms-eval tasks.
        data: a file or folder with custom questions; see `read_own_data`.
        metric: scores the answers to `data`; see `METRICS`.
        suffix: a line added to each question of `data`.
        max_new_tokens: longest answer to `data`, in tokens; tasks define their own limits.
        limit: number of rows to use from the start of each task; None for all.
        do_exif_transpose: apply the EXIF rotation to the images of `data`. Tasks always apply it.
        alpha_background, max_pixels: how the images of `data` are read, see `images.read_options.ReadOptions`.
        engine: one of `transformers_fastvlm.engines.ENGINES`.
        engine_options: of the engine, such as `dtype`, `device` and `size`.
        batch_size: questions that are answered at the same time; a killed run loses at most so many answers.
        images: keep small copies of the images of up to 200 samples for each task, the lowest scores first; None
            keeps them for `data` only.
        time_first_token: also measure the time to the first token.
    """

    tasks: tuple[str, ...] = ()
    include: str | os.PathLike[str] | None = None
    data: str | os.PathLike[str] | None = None
    metric: str = "exact"
    suffix: str | None = None
    max_new_tokens: int = 64
    limit: int | None = None
    do_exif_transpose: bool = True
    alpha_background: Colour = "white"
    max_pixels: int | None = None
    engine: str = "transformers"
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    images: bool | None = None
    time_first_token: bool = True


def evaluate(
    model: str,
    out: str | os.PathLike[str],
    options: EvaluationOptions,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    reading: Callable[[int, int], None] = lambda done, total: None,
    loaded: Callable[[], None] = lambda: None,
) -> EvaluationRun:
    """Evaluate a model and write the files that `results` describes.

    Every answer is written to disk when it ends. A killed evaluation resumes if it is started again with the same
    checkpoint and settings; answers from another checkpoint or other settings are not reused. Finished tasks are not
    generated again.

    Args:
        model: directory or hub repository of a FastVLM checkpoint.
        out: directory of the run; created if missing. Beside the results it holds `journal.jsonl` (all answers so
            far), `harness.log` (the output of lmms-eval) and `harness` (files that the tasks write).
        options: of the evaluation.
        progress: called with the numbers of answered questions and of all questions.
        reading: called with the bytes read so far and in all, while the model's files are read to notice changes.
        loaded: called when the model is loaded.

    Returns:
        The run as written. In `seconds`, "generate" is the time from the first question to the last answer. "total"
        adds the reading, scoring and writing of lmms-eval; it excludes loading the model and timing first tokens.

    Raises:
        ValueError: a task is unknown, data have no answers or unreadable images, an option is out of range, or the run
            is in use.
        ImportError: lmms-eval or the engine's package is not installed.
        OSError: the checkpoint or file does not exist.
    """
    if bool(options.tasks) == (options.data is not None):
        raise ValueError("give either names of tasks or a file or folder of data.")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit is {options.limit}; expected 1 or more, or none for all rows.")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _process_kept(), _into_log(folder / LOG):
        # Tasks of lmms-eval accept truncated images; in `data` they are errors.
        ImageFile.LOAD_TRUNCATED_IMAGES = options.data is None
        from .lmms_model import FastVLM

        start = time.perf_counter()
        tasks = _tasks(options)
        chosen = dict(options.engine_options)
        about = {"engine": options.engine, "versions": _versions(), **chosen}
        for name in _READING:  # non-default values only, so that answers of earlier versions can be reused
            if getattr(options, name) != getattr(EvaluationOptions, name):
                about[name] = getattr(options, name)
        before_loading = time.perf_counter()
        answering = FastVLM(
            model,
            options.engine,
            options.batch_size,
            journal=folder / JOURNAL,
            identity=about,
            progress=progress,
            reading=reading,
            time_first_token=options.time_first_token,
            **chosen,
        )
        dtype = answering.engine.dtype
        loaded()
        loading = time.perf_counter() - before_loading
        try:
            outcome = _harness(answering, tasks, folder, options.limit)
        finally:
            answering.clean()
        results: dict[str, TaskResult] = {}
        samples: list[Sample] = []
        for name, task in tasks.items():
            results[name], found = _result(name, task, outcome)
            keeps_images = options.data is not None if options.images is None else options.images
            samples += _with_images(found, task, folder / IMAGES) if keeps_images else found
        elsewhere = loading + answering.timing_seconds
        total = time.perf_counter() - start - elsewhere + answering.reused_seconds
    settings = {
        "tasks": list(tasks),
        "data": None if options.data is None else str(options.data),
        "suffix": options.suffix,
        "limit": options.limit,
        **{name: getattr(options, name) for name in _READING},
        "batch_size": options.batch_size,
        **chosen,
    }
    run = EvaluationRun(
        model=model,
        engine=options.engine,
        dtype=dtype,
        settings=settings,
        versions=dict(_versions()),
        tasks=results,
        seconds={"total": total, "generate": answering.generate_seconds},
        time_to_first_token=answering.first_token_seconds,
        samples=tuple(samples),
    )
    write_run(folder, run)
    return run


@contextlib.contextmanager
def _process_kept() -> Iterator[None]:
    """Restore the process state that tasks change: random streams, warnings, Pillow and truncated images."""
    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    with kept_random_streams(), warnings.catch_warnings():
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated


@contextlib.contextmanager
def _into_log(path: Path) -> Iterator[None]:
    """Import lmms-eval, and write its long output and that of its tasks to a file, for use after a failure.

    Output of other threads is not redirected. lmms-eval logs with loguru. If the process already uses loguru, its
    handlers stay and also get lmms-eval's lines.
    """
    is_new, stderr = "loguru" not in sys.modules, sys.stderr
    with (
        open(path, "w", encoding="utf-8", errors="backslashreplace") as log,
        contextlib.redirect_stdout(_OfThisThread(log, sys.stdout)),
        contextlib.redirect_stderr(_OfThisThread(log, sys.stderr)),
    ):
        import_harness()
        from loguru import logger

        if is_new:  # the default handler writes to the standard error at import time, which is the log
            logger.remove()
            logger.add(stderr, filter=_is_others)
        evaluating = threading.get_ident()
        handler = logger.add(log, level="INFO", filter=lambda record: record["thread"].id == evaluating)
        try:
            yield
        finally:
            logger.remove(handler)


class _OfThisThread:
    """A stream that sends the output of the creating thread and that of other threads to different streams.

    Args:
        own: receives the output of the creating thread.
        others: receives the output of all other threads.
    """

    def __init__(self, own: TextIO, others: TextIO) -> None:
        self._own, self._others, self._thread = own, others, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own if threading.get_ident() == self._thread else self._others, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._own if threading.get_ident() == self._thread else self._others)


def _is_others(record: Any) -> bool:
    """Return whether a log record comes from another package than lmms-eval."""
    return not str(record["name"]).startswith("lmms_eval")


def _tasks(options: EvaluationOptions) -> dict[str, Any]:
    """Return the tasks with their data, by name."""
    if options.data is not None:
        data = read_own_data(
            options.data,
            options.metric,
            options.limit,
            ReadOptions(**{name: getattr(options, name) for name in _READING}),
        )
        return {data.name: own_task(data, options.metric, options.suffix, options.max_new_tokens)}
    found = expand(options.tasks, options.include)
    return {name: load_task(name, path) for name, path in found.items()}


def _harness(answering: Any, tasks: Mapping[str, Any], folder: Path, limit: int | None) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from tenacity import RetryError

    arguments = argparse.Namespace(output_path=str(folder / "harness"), process_with_media=False, reasoning_tags=None)
    try:
        outcome: dict[str, Any] = simple_evaluate(
            model=answering,
            tasks=list(tasks.values()),
            task_manager=TaskManager("ERROR", include_defaults=False, model_name="fastvlm"),
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            process_docs_parallel=1,
            cli_args=arguments,
            verbosity="ERROR",
        )
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise ValueError(
            f"an answer could not be scored ({type(cause).__name__}: {cause}). See {folder / LOG}."
        ) from error
    return outcome


def _result(name: str, task: Any, outcome: Mapping[str, Any]) -> tuple[TaskResult, list[Sample]]:
    """Return a task's score and its samples, each row once."""
    metric = main_metric(name, task)
    rows = {row["doc_id"]: row for row in reversed(outcome["samples"][name])}  # the first of several filters
    samples = []
    for number, row in sorted(rows.items()):
        if metric not in row:
            raise ValueError(f"task {name}, row {number} has no {metric}: its data set has no answer for this row.")
        given = row["resps"][0]
        samples.append(
            Sample(
                task=name,
                doc_id=number,
                question=str(row["arguments"][0]),
                answers=right_answers(row["doc"], row["target"]),
                given=str(given[0] if isinstance(given, list) else given),
                score=_sample_score(task, metric, row[metric]),
            )
        )
    mean = statistics.fmean(sample.score for sample in samples)
    if name == "ocrbench":  # lmms-eval divides its points by 1000, however many rows there are
        points = round(sum(sample.score for sample in samples))
        return TaskResult(metric=metric, score=100 * mean, count=len(samples), raw=points), samples
    reported = next(v for key, v in outcome["results"][name].items() if key.split(",")[0] == metric)
    if isinstance(reported, int | float) and 0 <= reported <= 1:
        mean = float(reported)
    return TaskResult(metric=metric, score=100 * mean, count=len(samples), raw=reported), samples


def _sample_score(task: Any, metric: str, value: Any) -> float:
    """Return a row's score from 0 to 1; the task's aggregation converts values that are not numbers."""
    if isinstance(value, Mapping):
        value = value["score"] if "score" in value else task.aggregation()[metric]([value])
    return float(value)


def _with_images(samples: list[Sample], task: Any, folder: Path) -> Iterator[Sample]:
    """Yield the samples, those with the lowest scores with small copies of their images."""
    worst = sorted(samples, key=lambda sample: sample.score)[:_IMAGES_OF_TASK]
    wanted = {sample.doc_id for sample in worst}
    for sample in samples:
        names = []
        if sample.doc_id in wanted:
            for at, image in enumerate(task.doc_to_visual(task.eval_docs[sample.doc_id]) or []):
                names.append(f"{sample.task}/{sample.doc_id}-{at}.jpg")
                _save_small(image, folder / names[-1])
        yield Sample(**{**vars(sample), "images": tuple(names)})


def _save_small(image: Image.Image, path: Path) -> None:
    """Write a decoded image as JPEG, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = pil_to_rgb(image, WHITE).copy()
    small.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    with replacing(path, sync=False) as file:
        small.save(file, "JPEG", quality=85)


@functools.cache
def _versions() -> dict[str, str]:
    found = {"transformers_fastvlm": __version__}
    for name, package in (("transformers", "transformers"), ("torch", "torch"), ("lmms_eval", "lmms-eval")):
        found[name] = importlib.metadata.version(package)
    return found
