# SPDX-License-Identifier: Apache-2.0
"""Rows of the output: one for each request, answered or not, and what a report says of them."""

from collections.abc import Iterable, Iterator
from typing import Any

from ..engines.base import Answer
from .requests import Request

__all__ = ["COLUMNS", "Tally", "counted", "row_of"]

COLUMNS = (
    "source",
    "row",
    "image",
    "time",
    "question",
    "answer",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "error",
)
"""What each row of the output has."""

_EXAMPLES = 20


def row_of(request: Request, answer: Answer | None, error: str | None) -> dict[str, Any]:
    """Return the row of a request: `COLUMNS`, in their order."""
    return {
        "source": request.source,
        "row": request.row,
        "image": request.image,
        "time": request.time,
        "question": request.question,
        "answer": answer.text if answer else None,
        "finish_reason": answer.finish_reason if answer else None,
        "prompt_tokens": answer.prompt_tokens if answer else None,
        "completion_tokens": answer.completion_tokens if answer else None,
        "error": error,
    }


class Tally:
    """What a report says of rows.

    Attributes:
        rows: their number.
        errors: those without an answer.
        cut: answers that ended at the limit of tokens.
        examples: place and error of the first rows without an answer, 20 at most.
    """

    def __init__(self) -> None:
        self.rows = self.errors = self.cut = 0
        self.examples: list[tuple[str, str]] = []

    def over(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield rows on, counting them."""
        for row in rows:
            self.rows += 1
            self.cut += row["finish_reason"] == "length"
            if row["error"] is not None:
                self.errors += 1
                if len(self.examples) < _EXAMPLES:
                    self.examples.append((_place(row), row["error"]))
            yield row


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _place(row: dict[str, Any]) -> str:
    """Return how a row is named in a message."""
    if row["row"] is not None:
        return f"{row['source']}, row {row['row']}"
    return f"{row['source']}, {row['time']:.3f} s" if row["time"] is not None else str(row["source"])
