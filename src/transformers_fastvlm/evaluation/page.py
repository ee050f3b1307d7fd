# SPDX-License-Identifier: Apache-2.0
"""A single-file page of answers: images with question, expected and given answer, wrong answers first.

Text from data sets and models is untrusted. It is escaped, and the page's content security policy allows only the
page's script, style and embedded images.
"""

import base64
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.image_files import ImageFolder
from ..images.read_options import WHITE
from ..images.reading import pil_to_rgb
from ..storage.atomic_files import write_lines
from .results import IMAGES, EvaluationRun, Sample

__all__ = ["SAMPLES_A_TASK", "Shown", "write_page"]

SAMPLES_A_TASK = 50
_SIDE, _QUALITY = 640, 85
_WORDS = {"wrong": "wrong", "partly": "partly right", "right": "right"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_ALMOST = 1e-6


@dataclass(frozen=True)
class Shown:
    """The numbers of questions on the page and of all questions."""

    questions: int
    of: int


@dataclass
class _Case:
    """A question and the answer of each run, by the run's name."""

    task: str
    folder: Path
    sample: Sample
    given: dict[str, Sample] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """Wrong if the answer of one run is wrong, right if all are right, else partly right."""
        states = {_state(sample) for sample in self.given.values()}
        return "wrong" if "wrong" in states else "right" if states == {"right"} else "partly"

    @property
    def differs(self) -> bool:
        return len({round(sample.score, 6) for sample in self.given.values()}) > 1

    @property
    def answers(self) -> Counter[str]:
        """The distinct reference answers with their counts."""
        return Counter(self.sample.answers)

    @property
    def score(self) -> float:
        return sum(sample.score for sample in self.given.values()) / len(self.given)


def write_page(
    runs: Mapping[str, tuple[EvaluationRun, str | os.PathLike[str]]],
    file: str | os.PathLike[str],
    samples_a_task: int = SAMPLES_A_TASK,
) -> Shown:
    """Write a page with the questions and answers of the runs, atomically.

    A question that several runs share appears once, with all their answers. The file is self-contained: images are
    embedded as JPEG, at most 640 pixels high and wide.

    Args:
        runs: each with its directory, by display name.
        file: an existing file is replaced.
        samples_a_task: largest number of questions for each task: half of them wrong and half right if there are enough
            of both, spread evenly over the task.

    Raises:
        ValueError: `samples_a_task` is below 1, or an image is missing or cannot be read; the message names it.
        NotADirectoryError: samples have images, but a run has no image directory.
    """
    if samples_a_task < 1:
        raise ValueError(f"samples_a_task is {samples_a_task}; expected 1 or more.")
    cases = _cases(runs)
    tasks = list(dict.fromkeys(case.task for case in cases))
    chosen = []
    for task in tasks:
        chosen += _choose([case for case in cases if case.task == task], samples_a_task)
    order = {"wrong": 0, "partly": 1, "right": 2}
    chosen.sort(key=lambda case: (order[case.state], case.score))  # stable: tasks and questions stay in their order
    page = _render(
        runs=runs,
        tasks=tasks,
        cases=chosen,
        of=len(cases),
        of_task=Counter(case.task for case in chosen),
        of_state=Counter(case.state for case in chosen),
        with_images={case.task for case in cases if case.sample.images},
        words=_WORDS,
        state_of=_state,
        images=lambda case: [_embedded(ImageFolder(case.folder).open(image)) for image in case.sample.images],
        digest=_digest,
    )
    write_lines(Path(file), [page])
    return Shown(len(chosen), len(cases))


def _state(sample: Sample) -> str:
    return "wrong" if sample.score < _ALMOST else "right" if sample.score > 1 - _ALMOST else "partly"


def _cases(runs: Mapping[str, tuple[EvaluationRun, str | os.PathLike[str]]]) -> list[_Case]:
    found: dict[tuple[object, ...], _Case] = {}
    for name, (run, directory) in runs.items():
        for task in run.tasks:
            for sample in run.samples_of(task):
                key = (task, sample.doc_id, sample.question, sample.answers)
                case = found.setdefault(key, _Case(task, Path(directory) / IMAGES, sample))
                case.given[name] = sample
    return list(found.values())


def _choose(cases: list[_Case], most: int) -> list[_Case]:
    """Select cases; cases with stored images come first."""
    right = [case for case in cases if case.state == "right"]
    others = [case for case in cases if case.state != "right"]
    of_others = min(len(others), max(most - most // 2, most - len(right)))
    return _spread(others, of_others) + _spread(right, min(len(right), most - of_others))


def _spread(cases: list[_Case], number: int) -> list[_Case]:
    with_images = [case for case in cases if case.sample.images]
    if 0 < len(with_images) < len(cases):
        rest = [case for case in cases if not case.sample.images]
        first = min(number, len(with_images))
        return _spread(with_images, first) + _spread(rest, number - first)
    return [cases[index * len(cases) // number] for index in range(number)]


def _render(**values: Any) -> str:
    """Return the page's HTML; the template escapes all text from data sets and models."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    def clean(value: Any) -> Any:
        return _CONTROL.sub("\ufffd", value) if type(value) is str else value

    loader = PackageLoader(__package__, ".")
    environment = Environment(autoescape=True, finalize=clean, loader=loader, undefined=StrictUndefined)
    return environment.get_template("page.html.jinja").render(values)


def _embedded(image: Image.Image) -> tuple[str, int, int]:
    """Return an image with the colours that the model sees, as a data URL, and its width and height."""
    small = pil_to_rgb(image, WHITE)
    if small is image:
        small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", small.width, small.height


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
