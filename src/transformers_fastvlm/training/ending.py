# SPDX-License-Identifier: Apache-2.0
"""The last lines of a run: time, loss, best step and the next command."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.samples import parse_row
from ..tokens import IMAGE_TOKEN

__all__ = ["ending", "hours"]

_QUESTION, _IMAGE = "Describe the image.", "photo.jpg"
_LONGEST_QUESTION = 100
"""Characters of a question that still fits into a command to copy."""


def ending(out: Path, history: list[dict[str, Any]], seconds: float, steps: int, train: Any) -> Iterator[str]:
    """Yield the lines after a run.

    Args:
        out: the directory of the result.
        history: the log of `Trainer`, `state.log_history`.
        seconds: the time that this process trained; 0 if it did not.
        steps: the steps in that time.
        train: the training data, whose first image and question the next command has.
    """
    yield f"finished: {out}"
    if steps:
        yield f"time     {hours(seconds)} for {steps:,} steps, {seconds / steps:.3g} s each"
    losses = [(entry["loss"], entry["step"]) for entry in history if "loss" in entry]
    evaluated = [(entry["eval_loss"], entry["step"]) for entry in history if "eval_loss" in entry]
    for name, values in (("loss", losses), ("eval", evaluated)):
        if values:
            (last, step), (best, best_step) = values[-1], min(values)
            yield f"{name:<9}{last:.4g} at step {step:,}; best {best:.4g} at step {best_step:,}"
    yield f"next     {shlex.join(['fastvlm', 'generate', *_asked(train), '-m', str(out)])}"


def hours(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"


def _asked(train: Any) -> list[str]:
    """Return the words of a question: of the first row, if its image is a file and its question is short."""
    image, question = _IMAGE, _QUESTION
    try:
        messages, sources = parse_row(*train.row(0))
        folder = train.image_folder(0).folder
    except (AttributeError, IndexError, ValueError):  # a stream, another kind of data set, or an unreadable row
        return [image, "-p", question]
    asked = next(turn["content"] for turn in messages if turn["role"] == "user").replace(IMAGE_TOKEN, "").strip()
    if asked.isprintable() and 0 < len(asked) <= _LONGEST_QUESTION:
        question = asked
    if not sources:
        return ["-p", question]
    named = sources[0].get("path") if isinstance(sources[0], dict) else sources[0]
    if folder is not None and isinstance(named, str) and (file := folder / named).is_file():
        inside = file.is_relative_to(Path.cwd())
        image = os.path.relpath(file) if inside else str(file)
    return [image, "-p", question]
