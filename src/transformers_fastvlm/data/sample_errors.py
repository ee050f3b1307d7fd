# SPDX-License-Identifier: Apache-2.0
"""The error of a row that cannot be used, and the names of rows in it."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["ImageError", "LengthError", "Place", "SampleError", "listed", "row_name", "shortened"]

_LONGEST = 80
_MOST = 10


# A data loader raises its worker's exception again, with the whole traceback as the message.
_FROM_WORKER = re.compile(r"Caught \w+ in .*worker.*\.\n(?:.*\n)*[\w.]*\.sample_errors\.\w+: (?P<message>.+)")


def shortened(value: Any) -> str:
    """Return the repr of a value for messages: 80 characters at most; a long text is shortened in the middle."""
    if isinstance(value, str | bytes) and len(value) > _LONGEST - 3:
        head, tail = repr(value[:40]), repr(value[-30:])
        if len(head) + len(tail) <= _LONGEST:
            return f"{head[:-1]}...{tail[tail.index(tail[-1]) + 1 :]}"
    shown = repr(value[: _LONGEST + 1] if isinstance(value, str | bytes) else value)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 3]}..."


def listed(names: Iterable[Any]) -> str:
    """Return names, such as a row's keys, for messages: ten at most."""
    first = list(itertools.islice(names, _MOST + 1))
    return ", ".join([*map(shortened, first[:_MOST]), *(["..."] if len(first) > _MOST else [])]) or "none"


class SampleError(ValueError):
    """A row of a data set that cannot be used; the message names the row, what was expected and what to do.

    Attributes:
        place: the file or data set, row and id; None where the error came from elsewhere, such as another process.
        reason: the message without its place.
    """

    kind = "row"

    def __init__(self, reason: str, place: "Place | None" = None) -> None:
        if found := _FROM_WORKER.match(reason):
            reason = found["message"]
        super().__init__(f"{place}: {reason}" if place else reason)
        self.place = place
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.place)


class ImageError(SampleError):
    """An image that is missing or cannot be decoded; `on_bad_image="skip"` skips its row."""

    kind = "image"


class LengthError(SampleError):
    """A row that is too long and cannot be cut."""

    kind = "length"


@dataclass(frozen=True)
class Place:
    """The location of a row.

    Attributes:
        source: the file or data set.
        row: index, counting from 0.
        line: line of the file, counting from 1; None where rows are not lines.
        id: id of the row, if it has one.
    """

    source: str
    row: int
    line: int | None = None
    id: str | None = None

    def __str__(self) -> str:
        return f"{self.source}, {row_name(self.row, self.line, self.id)}"


def row_name(row: int, line: int | None, sample_id: str | None) -> str:
    """Return the name of a row within its source."""
    details = [f"line {line}"] if line is not None else []
    details += [f"id {shortened(sample_id)}"] if sample_id is not None else []
    return f"row {row}" + (f" ({', '.join(details)})" if details else "")
