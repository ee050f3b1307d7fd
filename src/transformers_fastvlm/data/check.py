# SPDX-License-Identifier: Apache-2.0
"""Checks of a whole data set before training: reads every row, reports problems and row lengths."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..images.read_options import Colour, ReadOptions
from .collator import FastVLMDataCollator
from .inspection import inspect_rows
from .row_sources import open_part, source_name
from .sample_errors import SampleError, row_name
from .samples import SampleDataset

__all__ = ["Problem", "Report", "check_dataset"]

_MOST_KEYS = 100
_PERCENTILES = {"median": 50, "p95": 95, "p99": 99}


@dataclass(frozen=True)
class Problem:
    """Something wrong with a row.

    Attributes:
        row: index, counting from 0.
        line: line of the file, counting from 1; None where rows are not lines.
        id: id of the row, if it has one.
        kind: "file" (the file ends too early), "row", "image" or "length".
        message: the problem, what was expected, and what to do.
    """

    row: int
    line: int | None
    id: str | None
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{row_name(self.row, self.line, self.id)}: {self.message}"


@dataclass
class Report:
    """What `check_dataset` found.

    Attributes:
        source: the file or data set.
        rows: number of rows.
        checked: number of rows that were read.
        images: number of images in the valid rows.
        text_only: number of valid rows without images.
        tokens: tokens of the valid rows before truncation: total, min, median, mean, p95, p99, max; None without a
            processor.
        longer: number of rows that `max_length` truncates; None without `max_length`.
        unread: keys that hold a value but are not read, with the number of their rows; 100 keys at most.
        problems: at most one per row, in order.
    """

    source: str
    rows: int
    checked: int = 0
    images: int = 0
    text_only: int = 0
    tokens: dict[str, float] | None = None
    longer: int | None = None
    unread: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-compatible dictionary; `load(exclude=…)` reads it from a file."""
        return {"ok": self.ok, **asdict(self)}


def check_dataset(
    source: Any,
    image_folder: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    name: str | None = None,
    follow_symlinks: bool = False,
    do_exif_transpose: bool = True,
    alpha_background: Colour = "white",
    max_pixels: int | None = None,
    processor: Any = None,
    conversation: str = "sft",
    max_length: int | None = None,
    limit: int | None = None,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read every row of a data set and decode every image.

    Args:
        source, image_folder, split, name, follow_symlinks, do_exif_transpose, alpha_background, max_pixels: as in
            `load`; one source, not a list.
        processor: a `FastVLMProcessor`, to count tokens.
        conversation, max_length: settings of the training run, to find the rows that `FastVLMDataCollator` would
            refuse or truncate.
        limit: read only this many rows, from the start.
        num_workers: number of worker processes that read; 0 reads in this process.
        progress: called with the number of rows read so far and of all rows.

    Raises:
        ValueError: `max_length` or `conversation` without a processor, a data set without rows, or an argument that
            `load` refuses.
        SampleError: the file holds no rows at all.
        OSError: a file or folder does not exist.
    """
    if processor is None and (max_length is not None or conversation != "sft"):
        raise ValueError("max_length and conversation need a processor, which counts the tokens; pass one.")
    collator = None
    if processor is not None:
        collator = FastVLMDataCollator(processor, conversation=conversation, max_length=max_length)
    reading = ReadOptions(do_exif_transpose=do_exif_transpose, alpha_background=alpha_background, max_pixels=max_pixels)
    part = open_part(source, image_folder, split, name, follow_symlinks, reading)
    dataset = SampleDataset([part])
    if not len(dataset) and part.rows.damage is None:
        raise ValueError(f"{source_name(source)} has no rows; expected at least one.")
    report = Report(source_name(source), len(dataset), longer=None if max_length is None else 0)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    lengths: list[int] = []
    for row, found in enumerate(inspect_rows(dataset, collator, num_workers)):
        if found.error is not None:
            report.problems.append(_problem(found.error, row))
        else:
            report.images += found.num_images
            report.text_only += found.num_images == 0
            if found.num_tokens is not None:
                lengths.append(found.num_tokens)
        for key in found.unread:
            if key in report.unread or len(report.unread) < _MOST_KEYS:
                report.unread[key] = report.unread.get(key, 0) + 1
        report.checked = row + 1
        if progress is not None:
            progress(report.checked, len(dataset))
    if part.rows.damage is not None:
        report.problems.append(_problem(part.rows.damage, len(part.rows), "file"))
    if collator is not None and lengths:
        counts = np.array(lengths)
        report.tokens = {
            "total": int(counts.sum()),
            "min": int(counts.min()),
            "mean": round(float(counts.mean()), 1),
            "max": int(counts.max()),
            **{key: float(np.percentile(counts, percent)) for key, percent in _PERCENTILES.items()},
        }
        if max_length is not None:
            report.longer = int((counts > max_length).sum())
    return report


def _problem(error: SampleError, row: int, kind: str | None = None) -> Problem:
    place = error.place
    line, sample_id = (None, None) if place is None else (place.line, place.id)
    return Problem(row, line, sample_id, kind or error.kind, error.reason)
