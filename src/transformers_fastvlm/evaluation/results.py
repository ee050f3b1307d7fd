# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves in its directory: `results.json`, `samples.jsonl` and the pictures under `images`."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..storage.atomic_files import write_lines

__all__ = [
    "IMAGES",
    "RESULTS",
    "SAMPLES",
    "EvaluationRun",
    "Sample",
    "TaskResult",
    "read_run",
    "write_run",
]

RESULTS, SAMPLES, IMAGES = "results.json", "samples.jsonl", "images"


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The score of one task.

    Attributes:
        metric: its name, such as "anls".
        score: in percent, 0 to 100.
        count: number of samples.
        raw: what the harness itself reported, any JSON value; None for nothing.
    """

    metric: str
    score: float
    count: int
    raw: Any = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question of a task and what the model answered.

    Attributes:
        task: one of the run's tasks.
        doc_id: names the sample within its task.
        question: as the model was asked it.
        answers: those that count as right.
        given: the model's answer.
        score: 0 (wrong) to 1 (right).
        images: files, relative to the run's `images` directory, with forward slashes.
    """

    task: str
    doc_id: int | str
    question: str
    answers: tuple[str, ...]
    given: str
    score: float
    images: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
    """A finished evaluation.

    Attributes:
        model: directory or repository.
        engine: what generated the answers, such as "transformers".
        dtype: such as "bfloat16".
        settings: everything else that was chosen, JSON values.
        versions: of the packages that the scores depend on.
        tasks: results by task.
        seconds: "total" and "generate".
        time_to_first_token: seconds from the decoded picture and question to the first token at batch 1, the median;
            None where it was not measured.
        samples: of all tasks, in any order.
    """

    model: str
    engine: str
    dtype: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    tasks: Mapping[str, TaskResult]
    seconds: Mapping[str, float]
    time_to_first_token: float | None = None
    samples: tuple[Sample, ...] = field(default=(), repr=False)

    def samples_of(self, task: str) -> list[Sample]:
        """Return the samples of one task."""
        return [sample for sample in self.samples if sample.task == task]


def write_run(directory: str | os.PathLike[str], run: EvaluationRun) -> None:
    """Write `results.json` and `samples.jsonl`, each whole or not at all; the pictures are the caller's.

    The results come last: a directory that has them is complete.

    Args:
        directory: made where it is missing; files of these names in it are replaced.

    Raises:
        ValueError: something that `read_run` would refuse, such as a score out of range; nothing is written then.
    """
    results: dict[str, Any] = {
        "model": run.model,
        "engine": run.engine,
        "dtype": run.dtype,
        "settings": dict(run.settings),
        "versions": dict(run.versions),
        "tasks": {name: _as_json(task) for name, task in run.tasks.items()},
        "seconds": dict(run.seconds),
        "time_to_first_token": run.time_to_first_token,
    }
    lines = [
        {
            "task": sample.task,
            "doc_id": sample.doc_id,
            "question": sample.question,
            "answers": list(sample.answers),
            "given": sample.given,
            "score": sample.score,
            "images": list(sample.images),
        }
        for sample in run.samples
    ]
    checked = _run(results, "the results")
    _check_samples(checked, [_sample(line, f"sample {at}") for at, line in enumerate(lines)], "the results")
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    # Of an older run's two files the one that says "complete" goes first.
    (out / RESULTS).unlink(missing_ok=True)
    # ASCII alone: a question from elsewhere may hold half a character, which UTF-8 cannot.
    write_lines(out / SAMPLES, (json.dumps(line, allow_nan=False) for line in lines))
    write_lines(out / RESULTS, [json.dumps(results, indent=2, allow_nan=False)])


def read_run(directory: str | os.PathLike[str]) -> EvaluationRun:
    """Return the evaluation that a directory holds.

    Raises:
        FileNotFoundError: there is no finished evaluation.
        ValueError: a file that is damaged, or whose contents contradict each other; the message says where.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory; expected one that fastvlm eval wrote.")
    for name in (RESULTS, SAMPLES):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; expected the directory of a finished evaluation. Run fastvlm eval with it "
                "as --out again, which goes on where it stopped."
            )
    path = folder / RESULTS
    run = _run(_loads(_text(path), str(path)), str(path))
    path = folder / SAMPLES
    samples = [
        _sample(_loads(line, where), where)
        for number, line in enumerate(_text(path).split("\n"), start=1)
        if line.strip()
        for where in [f"{path}, line {number}"]
    ]
    _check_samples(run, samples, str(path))
    return EvaluationRun(**{**vars(run), "samples": tuple(samples)})


def _as_json(task: TaskResult) -> dict[str, Any]:
    entry: dict[str, Any] = {"metric": task.metric, "score": task.score, "count": task.count}
    return entry if task.raw is None else entry | {"raw": task.raw}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); the file is damaged. Evaluate again.") from error


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}); the file is damaged. Evaluate again.") from error


def _run(content: Any, where: str) -> EvaluationRun:
    required = ("model", "engine", "dtype", "settings", "versions", "tasks", "seconds", "time_to_first_token")
    values = _object(content, where, required)
    for name in ("model", "engine", "dtype"):
        _string(values[name], f"{where}: {name}")
    for name in ("settings", "versions", "tasks", "seconds"):
        if not isinstance(values[name], dict):
            raise _wrong(f"{where}: {name}", values[name], "an object")
    for name, version in values["versions"].items():
        _string(version, f"{where}: versions, {name}")
    seconds = _object(values["seconds"], f"{where}: seconds", ("total", "generate"))
    for name, value in seconds.items():
        _number(value, f"{where}: seconds, {name}", math.inf)
    first = values["time_to_first_token"]
    if first is not None:
        _number(first, f"{where}: time_to_first_token", math.inf)
    if not values["tasks"]:
        raise ValueError(f"{where}: tasks is empty; expected at least one. Evaluate again.")
    tasks = {}
    for name, entry in values["tasks"].items():
        at = f"{where}: task {name!r}"
        fields = _object(entry, at, ("metric", "score", "count"), ("raw",))
        _string(fields["metric"], f"{at}: metric")
        _number(fields["score"], f"{at}: score", 100.0)
        if isinstance(fields["count"], bool) or not isinstance(fields["count"], int) or fields["count"] < 1:
            raise _wrong(f"{at}: count", fields["count"], "a whole number of 1 or more")
        tasks[name] = TaskResult(**fields)
    return EvaluationRun(**{**values, "tasks": tasks})


def _sample(content: Any, where: str) -> Sample:
    values = _object(content, where, ("task", "doc_id", "question", "answers", "given", "score", "images"))
    for name in ("task", "question", "given"):
        _string(values[name], f"{where}: {name}")
    if isinstance(values["doc_id"], bool) or not isinstance(values["doc_id"], int | str):
        raise _wrong(f"{where}: doc_id", values["doc_id"], "a whole number or a text")
    for name in ("answers", "images"):
        if not isinstance(values[name], list) or not all(isinstance(item, str) for item in values[name]):
            raise _wrong(f"{where}: {name}", values[name], "a list of texts")
    for image in values["images"]:
        _check_inside(image, f"{where}: images")
    _number(values["score"], f"{where}: score", 1.0)
    return Sample(**{**values, "answers": tuple(values["answers"]), "images": tuple(values["images"])})


def _check_inside(name: str, where: str) -> None:
    """Raise ValueError unless a name is that of a file below the directory it is relative to."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or set(name) & set("\\\0:"):
        raise _wrong(where, name, f"a path below {IMAGES}, with forward slashes")


def _check_samples(run: EvaluationRun, samples: list[Sample], where: str) -> None:
    """Raise ValueError unless there are as many samples of each task as its result says, each once."""
    counts = Counter(sample.task for sample in samples)
    for name in counts.keys() | run.tasks.keys():
        expected = run.tasks[name].count if name in run.tasks else 0
        if counts[name] != expected:
            raise ValueError(
                f"{where}: task {name!r} has {counts[name]} samples, but {RESULTS} counts {expected}. The two files "
                "belong to different runs; evaluate again."
            )
    double = [key for key, number in Counter((sample.task, sample.doc_id) for sample in samples).items() if number > 1]
    if double:
        raise ValueError(f"{where}: sample {double[0][1]!r} of task {double[0][0]!r} is there twice. Evaluate again.")


def _object(content: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _wrong(where, content, "an object")
    missing = [name for name in required if name not in content]
    unknown = [name for name in content if name not in (*required, *optional)]
    if missing or unknown:
        raise ValueError(
            f"{where}: keys missing: {', '.join(missing) or 'none'}; not known: {', '.join(unknown) or 'none'}. "
            "Another version of this package may have written it; evaluate again."
        )
    return content


def _string(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise _wrong(where, value, "a text")


def _number(value: Any, where: str, largest: float) -> None:
    valid = not isinstance(value, bool) and isinstance(value, int | float)
    if not valid or not math.isfinite(value) or not 0 <= value <= largest:
        expected = "of 0 or more" if largest == math.inf else f"from 0 to {largest:g}"
        raise _wrong(where, value, f"a number {expected}")


def _wrong(where: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{where} is {str(value)[:80]!r} ({type(value).__name__}); expected {expected}. Evaluate again.")
