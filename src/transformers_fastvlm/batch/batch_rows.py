# SPDX-License-Identifier: Apache-2.0
"""Rows of the output, one for each request, and their report."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engines.base import Answer
from ..images.decoding import FIRST_OF_SEVERAL
from .requests import Request

__all__ = ["COLUMNS", "Report", "counted", "row_of"]

COLUMNS = (
    "source", "row", "image", "time", "question", "answer", "finish_reason", "prompt_tokens", "completion_tokens",
    "error",
)  # fmt: skip
"""Columns of the output."""

_EXAMPLES = 20


def row_of(request: Request, answer: Answer | None, error: str | None) -> dict[str, Any]:
    """Return the row of a request, with the keys `COLUMNS` in that order."""
    asked = (request.source, request.row, request.image, request.time, request.question)
    answered: tuple[Any, ...] = (None,) * 4
    if answer is not None:
        answered = (answer.text, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens)
    return dict(zip(COLUMNS, (*asked, *answered, error), strict=True))


@dataclass(kw_only=True)
class Report:
    """Report of a run.

    Attributes:
        output: the output file.
        rows: number of its rows.
        resumed_rows: number of rows from earlier runs.
        errors: number of rows without an answer.
        cut: number of answers that ended at `max_new_tokens`.
        left_out: number of skipped files in folders, neither readable images nor videos, by suffix.
        first_only: number of answers about the first of several frames or pages of an image.
        examples: source and error of the first rows without an answer, at most 20.
        subtitles: subtitle files that were written in addition to the output.
    """

    output: Path
    resumed_rows: int
    left_out: Mapping[str, int]
    subtitles: tuple[Path, ...]
    rows: int = 0
    errors: int = 0
    cut: int = 0
    first_only: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def over(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass on rows and count them; keys that only the journal needs are removed."""
        for row in rows:
            self.rows += 1
            self.cut += row.get("finish_reason") == "length"
            self.first_only += row.pop(FIRST_OF_SEVERAL, False)
            self.errors += row["error"] is not None
            if row["error"] is not None and self.errors <= _EXAMPLES:
                self.examples.append((_place(row), row["error"]))
            yield row


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _place(row: dict[str, Any]) -> str:
    if row["row"] is not None:
        return f"{row['source']}, row {row['row']}"
    return f"{row['source']}, {row['time']:.3f} s" if row["time"] is not None else str(row["source"])
