# SPDX-License-Identifier: Apache-2.0
"""Rows by index: the common interface, data sets of Hugging Face's `datasets`, and lists in memory."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from ..storage.digests import file_digests, joined
from .row_fields import SYSTEM_KEYS
from .sample_errors import Place, SampleError

__all__ = ["HubRows", "JoinedRows", "ListRows", "Rows"]

_WORDS = ("id", "conversations", "messages", *SYSTEM_KEYS)


class Rows:
    """Rows of one source, each a mapping.

    Attributes:
        name: name of the source in errors.
        damage: why the rows end too early; None if they do not.
    """

    name: str
    damage: SampleError | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        raise NotImplementedError

    def text_of(self, row: int) -> Mapping[str, Any]:
        """Return a row, possibly without its image columns."""
        return self[row]

    def place(self, row: int, sample_id: str | None = None) -> Place:
        """Return the place of a row, which names it in errors."""
        return Place(self.name, row, None, sample_id)

    def files(self) -> Sequence[str]:
        """Return the files that `digest` reads."""
        return ()

    def digest(self, advance: Callable[[int], None]) -> str:
        """Return a digest that changes with the rows where the source allows it; image files are not included.

        Args:
            advance: called with the number of bytes of each chunk that was read of `files`.
        """
        return ""


class HubRows(Rows):
    """Rows of a `datasets.Dataset`, whose images stay undecoded.

    Rows are read in Arrow format: casting a column of lists of images to `decode=False` would copy the whole data set
    on disk.
    """

    def __init__(self, dataset: Any, name: str, files: Sequence[str] = ()) -> None:
        self.name, self._files = name, list(files)
        self._made = str(getattr(dataset, "_fingerprint", ""))
        self._all = dataset.with_format("arrow")
        self._words = self._all.select_columns([column for column in dataset.column_names if column in _WORDS])

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return self._read(self._all, row)

    def text_of(self, row: int) -> Mapping[str, Any]:
        return self._read(self._words, row)

    def files(self) -> Sequence[str]:
        return self._files

    def digest(self, advance: Callable[[int], None]) -> str:
        return joined(file_digests(self._files, advance)) if self._files else self._made

    def _read(self, table: Any, row: int) -> Mapping[str, Any]:
        values: Mapping[str, Any] = table[row : row + 1].to_pylist()[0]
        return values


class JoinedRows(Rows):
    """The rows of several files, concatenated; each row is named by its file and its index there."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = list(parts)
        self._ends = list(accumulate(map(len, self._parts)))
        self.damage = next((part.damage for part in self._parts if part.damage is not None), None)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, row: int) -> tuple[int, int]:
        """Return the index of the part that a row is in, and the row's index there."""
        number = bisect_right(self._ends, row)
        return number, row - (self._ends[number - 1] if number else 0)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        number, inside = self.locate(row)
        return self._parts[number][inside]

    def text_of(self, row: int) -> Mapping[str, Any]:
        number, inside = self.locate(row)
        return self._parts[number].text_of(inside)

    def place(self, row: int, sample_id: str | None = None) -> Place:
        number, inside = self.locate(row)
        return self._parts[number].place(inside, sample_id)

    def files(self) -> Sequence[str]:
        return [file for part in self._parts for file in part.files()]

    def digest(self, advance: Callable[[int], None]) -> str:
        return joined(part.digest(advance) for part in self._parts)


class ListRows(Rows):
    """Rows in memory."""

    name = "the list of rows"

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        value = self._rows[row]
        if not isinstance(value, Mapping):
            raise SampleError(f"the row is a {type(value).__name__}; expected a dictionary.", self.place(row))
        return value
