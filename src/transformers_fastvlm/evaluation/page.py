# SPDX-License-Identifier: Apache-2.0
"""A page of answers: pictures with question, expected and given answer, wrong ones first, in one file.

Whatever comes from data sets and models is untrusted: all of it is escaped, and the page's content policy lets nothing
run or load but its own script, its own style and the pictures inside it.
"""

import base64
import hashlib
import html
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..data.image_files import ImageFolder
from ..images.reading import pil_to_rgb
from ..storage.atomic_files import write_lines
from .page_parts import SCRIPT, STYLE
from .results import IMAGES, EvaluationRun, Sample

__all__ = ["SAMPLES_A_TASK", "Shown", "write_page"]

SAMPLES_A_TASK = 50
_SIDE, _QUALITY = 640, 85
_WORDS = {"wrong": "wrong", "partly": "partly right", "right": "right"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_ALMOST = 1e-6


@dataclass(frozen=True)
class Shown:
    """How much of the runs is on the page: questions there, and questions in all."""

    questions: int
    of: int


@dataclass
class _Case:
    """A question, and what each run answered, by the run's name."""

    task: str
    folder: Path
    sample: Sample
    given: dict[str, Sample] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """Wrong if one of the runs is all wrong, right if all are right."""
        states = {_state(sample) for sample in self.given.values()}
        return "wrong" if "wrong" in states else "right" if states == {"right"} else "partly"

    @property
    def differs(self) -> bool:
        return len({round(sample.score, 6) for sample in self.given.values()}) > 1

    @property
    def score(self) -> float:
        return sum(sample.score for sample in self.given.values()) / len(self.given)


def write_page(
    runs: Mapping[str, tuple[EvaluationRun, str | os.PathLike[str]]],
    file: str | os.PathLike[str],
    samples_a_task: int = SAMPLES_A_TASK,
) -> Shown:
    """Write a page of what the runs were asked and answered, whole or not at all.

    The same question of several runs is there once, with all their answers. The file holds everything, pictures
    included (as JPEG, at most 640 pixels high and wide), and loads nothing.

    Args:
        runs: each with its directory, by the names to call them.
        file: replaced if it is there.
        samples_a_task: most questions of each task; half of them wrong and half right where there are enough of both,
            spread evenly over the task.

    Raises:
        ValueError: `samples_a_task` is below 1, or a picture is missing or cannot be read; the message names it.
        NotADirectoryError: samples have pictures, but a run has no directory of them.
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
    shown = Shown(len(chosen), len(cases))
    out = Path(file)
    write_lines(out, _page(runs, tasks, chosen, cases, shown))
    return shown


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
    """Return some cases; those whose pictures the run kept before those whose it did not."""
    right = [case for case in cases if case.state == "right"]
    others = [case for case in cases if case.state != "right"]
    of_others = min(len(others), max(most - most // 2, most - len(right)))
    return _spread(others, of_others) + _spread(right, min(len(right), most - of_others))


def _spread(cases: list[_Case], number: int) -> list[_Case]:
    pictured = [case for case in cases if case.sample.images]
    if 0 < len(pictured) < len(cases):
        rest = [case for case in cases if not case.sample.images]
        first = min(number, len(pictured))
        return _spread(pictured, first) + _spread(rest, number - first)
    return [cases[index * len(cases) // number] for index in range(number)]


def _page(
    runs: Mapping[str, tuple[EvaluationRun, object]],
    tasks: list[str],
    chosen: list[_Case],
    cases: list[_Case],
    shown: Shown,
) -> Iterator[str]:
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(STYLE)}'; script-src '{_hash(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = _text(f"Answers: {', '.join(runs)}")
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{title}</h1>"
    yield f"<p>{shown.questions} of {_count(shown.of, 'question')}, wrong ones first.</p>\n" + '<ul class="runs">'
    for name, (run, _) in runs.items():
        scores = ", ".join(f"{task} {result.score:.1f} % ({result.metric})" for task, result in run.tasks.items())
        yield f"<li>{_text(name)}: {_text(run.model)}, {_text(run.engine)}, {_text(run.dtype)}. {_text(scores)}</li>"
    yield "</ul>\n</header>"
    yield from _filter(tasks, chosen, several=len(runs) > 1)
    yield "<main>"
    folders: dict[Path, ImageFolder] = {}
    pictured = {case.task for case in cases if case.sample.images}
    for case in chosen:
        at = tasks.index(case.task)
        yield _article(case, at, several=len(runs) > 1, pictured=case.task in pictured, folders=folders)
    yield '</main>\n<dialog aria-label="The picture, larger"><img alt=""><button type="button">Close</button></dialog>'
    yield f"<script>{SCRIPT}</script>\n</body>\n</html>"


def _filter(tasks: list[str], chosen: list[_Case], several: bool) -> Iterator[str]:
    """Yield the form; the script shows it, which without it would do nothing."""
    counts = Counter(case.task for case in chosen)
    states = Counter(case.state for case in chosen)
    yield '<form id="filter" hidden aria-label="Which answers to show" autocomplete="off">'
    options = "".join(f'<option value="{at}">{_text(task)} ({counts[task]})</option>' for at, task in enumerate(tasks))
    yield f'<label>Task <select name="task"><option value="">all ({len(chosen)})</option>{options}</select></label>'
    choices = [("", f"all ({len(chosen)})")]
    choices += [(state, f"{words} ({states[state]})") for state, words in _WORDS.items() if states[state]]
    if several:
        choices.append(("differ", f"runs differ ({sum(case.differs for case in chosen)})"))
    yield "<fieldset><legend>Answers</legend>"
    for value, words in choices:
        checked = "" if value else " checked"
        yield f'<label><input type="radio" name="state" value="{value}"{checked}>{words}</label>'
    yield '</fieldset>\n<output id="count" aria-live="polite"></output>\n</form>'


def _article(case: _Case, task: int, several: bool, pictured: bool, folders: dict[Path, ImageFolder]) -> str:
    """Return a question's part of the page; `pictured`: its task is about pictures, so that one missing is told."""
    name = f"{case.task} · {case.sample.doc_id}"
    differs = " data-differ" if case.differs else ""
    parts = [f'<article class="{case.state}" data-task="{task}" data-state="{case.state}"{differs}>']
    parts.append(f"<h2>{_text(name)}</h2>")
    if case.sample.images:
        folder = folders.setdefault(case.folder, ImageFolder(case.folder))
        parts.append('<div class="pictures">')
        for number, image in enumerate(case.sample.images, start=1):
            which = f"picture {number} of {len(case.sample.images)}" if len(case.sample.images) > 1 else "picture"
            source, width, height = _embedded(folder.open(image))
            parts.append(
                f'<button type="button" title="Enlarge"><img src="{source}" width="{width}" height="{height}" '
                f'loading="lazy" alt="{_text(f"{which}, {name}")}"></button>'
            )
        parts.append("</div>")
    elif pictured:
        parts.append(f"<p>{_empty('The run kept no picture of this question.')}</p>")
    parts.append(f'<p class="question" dir="auto">{_text(case.sample.question)}</p>\n<dl>')
    parts.append(f'<dt>Expected</dt><dd dir="auto">{_answers(case.sample.answers)}</dd>')
    for run, sample in case.given.items():
        state = _state(sample)
        score = f" {100 * sample.score:.0f} %" if state == "partly" else ""
        label = f"Given by {_text(run)}" if several else "Given"
        parts.append(
            f'<dt class="{state}">{label}: <span class="mark">{_WORDS[state]}{score}</span></dt>'
            f'<dd dir="auto">{_text(sample.given) or _empty("no answer")}</dd>'
        )
    parts.append("</dl>\n</article>")
    return "\n".join(parts)


def _answers(answers: Sequence[str]) -> str:
    """Return the different answers, with how often each is among them."""
    counts = Counter(answers)
    shown = [
        (_text(answer) or _empty("empty")) + (f" ({number} times)" if number > 1 else "")
        for answer, number in counts.items()
    ]
    return ", ".join(shown) or _empty("none")


def _empty(word: str) -> str:
    return f'<span class="empty">{word}</span>'


def _embedded(image: Image.Image) -> tuple[str, int, int]:
    """Return a picture, as the model sees its colours, as a data address, and its width and height."""
    small = pil_to_rgb(image)
    if small is image:
        small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", small.width, small.height


def _text(text: str) -> str:
    """Return a text as HTML, also for attributes in double quotes."""
    return html.escape(_CONTROL.sub("\ufffd", text), quote=True)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")
