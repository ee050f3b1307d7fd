# SPDX-License-Identifier: Apache-2.0
"""The files of an evaluation: `results.json`, `samples.jsonl` and the images under `images`."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..storage.atomic_files import write_lines

__all__ = ["IMAGES", "RESULTS", "SAMPLES", "EvaluationRun", "Sample", "TaskResult", "read_run", "write_run"]

RESULTS, SAMPLES, IMAGES = "results.json", "samples.jsonl", "images"

_Check = tuple[Callable[[Any], bool], str]
"""A test of a value, and a description of the expected value."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The score of one task.

    Attributes:
        metric: its name, such as "anls".
        score: in percent, 0 to 100.
        count: number of samples.
        raw: the value that the harness reported, any JSON value; None if it reported none.
    """

    metric: str
    score: float
    count: int
    raw: Any = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question of a task and the model's answer.

    Attributes:
        task: one of the run's tasks.
        doc_id: identifies the sample within its task.
        question: as given to the model.
        answers: the reference answers.
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
        engine: that generated the answers, such as "transformers".
        dtype: such as "bfloat16".
        settings: all other settings, as JSON values.
        versions: of the packages that the scores depend on.
        tasks: results by task.
        seconds: "total" and "generate".
        time_to_first_token: median seconds from the decoded image and question to the first token at batch size 1;
            None if it was not measured.
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
    """Write `results.json` and `samples.jsonl`, each atomically; the caller writes the images.

    `results.json` is written last: a directory that has it is complete.

    Args:
        directory: created if missing; existing files of these names are replaced.

    Raises:
        ValueError: `read_run` would refuse a value, such as a score out of range; nothing is written.
    """
    results = {name: value for name, value in asdict(run).items() if name != "samples"}
    for task in results["tasks"].values():
        if task["raw"] is None:
            del task["raw"]
    lines = [asdict(sample) for sample in run.samples]
    checked = _run(results, "the results")
    _check_samples(checked, [_sample(line, f"sample {at}") for at, line in enumerate(lines)], "the results")
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    # Remove an older run's results first, since they mark the directory as complete.
    (out / RESULTS).unlink(missing_ok=True)
    # ASCII only: a question may contain a lone surrogate, which UTF-8 cannot encode.
    write_lines(out / SAMPLES, (json.dumps(line, allow_nan=False) for line in lines))
    write_lines(out / RESULTS, [json.dumps(results, indent=2, allow_nan=False)])


def read_run(directory: str | os.PathLike[str]) -> EvaluationRun:
    """Read the evaluation in a directory.

    Raises:
        FileNotFoundError: the directory has no finished evaluation.
        ValueError: a file is damaged, or the files do not match; the message names the file.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory; expected one that fastvlm eval wrote.")
    for name in (RESULTS, SAMPLES):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; expected the directory of a finished evaluation. Run fastvlm eval again with "
                "this directory as --output to resume."
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


def _number(largest: float, expected: str) -> _Check:
    def right(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= largest

    return right, f"a number {expected}"


def _is_inside(name: str) -> bool:
    """Return whether a relative path stays inside its directory."""
    return not any(part in ("", ".", "..") for part in name.split("/")) and not set(name) & set("\\\0:")


_TEXT: _Check = (lambda value: isinstance(value, str), "a text")
_TEXTS: _Check = (
    lambda value: isinstance(value, list | tuple) and all(isinstance(item, str) for item in value),
    "a list of texts",
)
_OBJECT: _Check = (lambda value: isinstance(value, Mapping), "an object")
_SECONDS = _number(math.inf, "of 0 or more")
_PATH: _Check = (_is_inside, f"a path below {IMAGES}, with forward slashes")
_RUN = {
    **dict.fromkeys(("model", "engine", "dtype"), _TEXT),
    **dict.fromkeys(("settings", "versions", "tasks", "seconds"), _OBJECT),
    "time_to_first_token": (lambda value: value is None or _SECONDS[0](value), _SECONDS[1]),
}
_TASK = {
    "metric": _TEXT,
    "score": _number(100.0, "from 0 to 100"),
    "count": (lambda value: type(value) is int and value >= 1, "a whole number of 1 or more"),
    "raw": (lambda value: True, "anything"),
}
_SAMPLE = {
    **dict.fromkeys(("task", "question", "given"), _TEXT),
    "doc_id": (lambda value: type(value) in (int, str), "a whole number or a text"),
    **dict.fromkeys(("answers", "images"), _TEXTS),
    "score": _number(1.0, "from 0 to 1"),
}


def _check(value: Any, check: _Check, where: str) -> None:
    if not check[0](value):
        raise ValueError(
            f"{where} is {str(value)[:80]!r} ({type(value).__name__}); expected {check[1]}. Evaluate again."
        )


def _fields(content: Any, checks: Mapping[str, _Check], where: str, separator: str = ": ") -> Any:
    """Check that `content` is an object with exactly these keys and valid values, and return it; "raw" is optional."""
    _check(content, _OBJECT, where)
    missing = [name for name in checks if name not in content and name != "raw"]
    unknown = [name for name in content if name not in checks]
    if missing or unknown:
        raise ValueError(
            f"{where}: missing keys: {', '.join(missing) or 'none'}; unknown keys: {', '.join(unknown) or 'none'}. "
            "Another version of this package may have written the file; evaluate again."
        )
    for name, value in content.items():
        _check(value, checks[name], f"{where}{separator}{name}")
    return content


def _run(content: Any, where: str) -> EvaluationRun:
    values = _fields(content, _RUN, where)
    _fields(values["versions"], dict.fromkeys(values["versions"], _TEXT), f"{where}: versions", ", ")
    _fields(values["seconds"], dict.fromkeys(("total", "generate"), _SECONDS), f"{where}: seconds", ", ")
    if not values["tasks"]:
        raise ValueError(f"{where}: tasks is empty; expected at least one. Evaluate again.")
    tasks = {
        name: TaskResult(**_fields(entry, _TASK, f"{where}: task {name!r}")) for name, entry in values["tasks"].items()
    }
    return EvaluationRun(**{**values, "tasks": tasks})


def _sample(content: Any, where: str) -> Sample:
    values = _fields(content, _SAMPLE, where)
    for image in values["images"]:
        _check(image, _PATH, f"{where}: images")
    return Sample(**{**values, "answers": tuple(values["answers"]), "images": tuple(values["images"])})


def _check_samples(run: EvaluationRun, samples: list[Sample], where: str) -> None:
    """Raise ValueError unless each task has as many samples as its result counts, and no duplicates."""
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
        raise ValueError(f"{where}: sample {double[0][1]!r} of task {double[0][0]!r} occurs twice. Evaluate again.")
