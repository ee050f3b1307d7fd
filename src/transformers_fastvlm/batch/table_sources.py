# SPDX-License-Identifier: Apache-2.0
"""Tables of images and questions: CSV, TSV, JSON, JSONL and Parquet.

An invalid row becomes a request with an error. A table that cannot be opened, or lacks a column, raises.
"""

import csv
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .._optional import needs
from ..data.image_files import ImageFolder
from ..data.json_rows import JsonRows
from ..data.row_fields import is_absent
from ..data.sample_errors import listed, shortened
from ..engines.prompts import is_utf8
from ..storage.digests import file_digest
from .requests import EXTRA, PromptTemplate, Request, SourceOptions, printable

__all__ = ["CsvSource", "JsonSource", "ParquetSource", "TableSource", "open_table"]

_PARQUET_ROWS = 64  # read at a time
_LONGEST_NAME = 1024  # longer values are not file names but mistakes, such as base64


class TableSource:
    """A table with an image and optional values for the prompt in each row.

    Args:
        name: path of the file.
        options: options for requests.

    Raises:
        ValueError: the file is damaged or lacks a column.
        OSError: it cannot be read, or there is no such image folder.
    """

    _count: int

    def __init__(self, name: str, options: SourceOptions) -> None:
        self.name, self.options = name, options
        self._prompt = PromptTemplate(options.prompt)
        folder = os.path.dirname(os.path.abspath(name)) if options.image_folder is None else options.image_folder
        self._images = ImageFolder(folder, reading=options)

    def identity(self, advance: Callable[[int], None]) -> dict[str, Any]:
        """Return name, number of rows, and a digest of the file; `advance` gets the number of bytes of each chunk."""
        return {"name": printable(self.name), "count": self.rows(), "digest": file_digest(self.name, advance)}

    def rows(self) -> int:
        """Return the number of rows."""
        return self._count

    def _values(self) -> Iterator[Mapping[str, Any] | str]:
        """Yield each row, or the error of reading it."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Request]:
        for index, row in enumerate(self._values()):
            yield self._request(index, row)

    def _request(self, index: int, row: Mapping[str, Any] | str) -> Request:
        source = printable(self.name)
        if isinstance(row, str):
            return Request(source=source, row=index, question=None, error=row)
        column = self.options.image_column
        image = None if column is None else row.get(column)
        if isinstance(image, list | tuple) and len(image) == 1:
            image = image[0]
        label = image if isinstance(image, str) else image.get("path") if isinstance(image, Mapping) else None
        label = label.encode("utf-8", "backslashreplace").decode() if isinstance(label, str) else None
        if label is not None and len(label) > _LONGEST_NAME:
            label = shortened(label)
        question = None
        try:
            filled = self._prompt.fill(row)
            if not is_utf8(filled):
                raise ValueError("the question has a lone surrogate (half a character). Write the file again.")
            question = filled
            if column is not None and (is_absent(image) or image == ""):
                raise ValueError(f"column {column!r} is empty in this row; expected an image.")
        except ValueError as error:
            return Request(source=source, row=index, image=label, question=question, error=str(error))
        if column is None:
            return Request(source=source, row=index, question=question)
        if isinstance(image, bytes):
            image = {"bytes": image, "path": None}
        opened = functools.partial(self._images.open, image)
        file = self._images.path_of(image)
        return Request(source=source, row=index, image=label, file=file, question=question, open_image=opened)

    def _used(self) -> tuple[str, ...]:
        """Return the columns that requests need."""
        image = self.options.image_column
        return tuple(dict.fromkeys((*([] if image is None else [image]), *self._prompt.columns)))

    def _check_columns(self, columns: Sequence[str]) -> None:
        for column in self._used():
            if column not in columns:
                advice = " Set the images' column with --image-column." if column == self.options.image_column else ""
                raise ValueError(f"{self.name} has no column {column!r}; it has {listed(columns)}.{advice}")
            if columns.count(column) > 1:
                raise ValueError(f"{self.name} has several columns {column!r}; rename them.")


class _Lines:
    """The lines of a file; the lines of the current record can be read again."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._waiting: deque[str] = deque()
        self._record: list[str] = []
        self._number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._file)
        self._record.append(line)
        self._number += 1
        return line

    def begin_record(self) -> int:
        """Forget the lines so far, and return the number of the next line, counted from 1."""
        self._record.clear()
        return self._number + 1

    def again_from_second(self) -> None:
        """Go back to the second line of the record."""
        again = self._record[1:]
        self._waiting.extendleft(reversed(again))
        self._number -= len(again)


class CsvSource(TableSource):
    """A CSV file (or TSV, by its suffix) in UTF-8, whose first line names the columns."""

    def __init__(self, name: str, options: SourceOptions) -> None:
        super().__init__(name, options)
        columns = next(self._records(), [])
        if isinstance(columns, str):
            raise ValueError(f"{name}: the first line, which names the columns, cannot be read: {columns}")
        if not columns:
            raise ValueError(f"{name} is empty; expected a first line that names the columns.")
        self._columns = columns
        self._check_columns(columns)
        self._count = sum(1 for _ in self._values())

    def _records(self) -> Iterator[list[str] | str]:
        """Yield the fields of each record, or the error of reading it; empty lines are skipped.

        An unclosed quote swallows the following lines. So after an error only the record's first line is skipped, and
        a new record starts at the next line.
        """
        delimiter = "\t" if self.name.lower().endswith(".tsv") else ","
        # Bytes that are not UTF-8 become surrogates, so that only their row fails.
        with open(self.name, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = _Lines(file)
            records = csv.reader(lines, delimiter=delimiter, strict=True)
            while True:
                first = lines.begin_record()
                try:
                    fields = next(records)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield f"the row is not valid CSV ({error}, line {first})."
                    lines.again_from_second()
                    records = csv.reader(lines, delimiter=delimiter, strict=True)
                    continue
                if not all(map(is_utf8, fields)):
                    yield f"the row is not UTF-8 (line {first}). Convert the file."
                elif fields:
                    yield fields

    def _values(self) -> Iterator[Mapping[str, Any] | str]:
        records = self._records()
        next(records)
        for fields in records:
            if isinstance(fields, str):
                yield fields
            elif len(fields) != len(self._columns):
                yield f"the row has {len(fields)} fields; expected {len(self._columns)}, as in the first line."
            else:
                yield dict(zip(self._columns, fields, strict=True))


class JsonSource(TableSource):
    """A JSON list of objects, or JSONL with one object per line."""

    def __init__(self, name: str, options: SourceOptions) -> None:
        super().__init__(name, options)
        self._rows = JsonRows(name)
        self._count = len(self._rows) + (self._rows.damage is not None)  # a truncated row counts
        self._check_keys()

    def _check_keys(self) -> None:
        """Refuse columns that no row has; in a valid table, the first row has all."""
        missing = set(self._used())
        first: list[str] = []
        for row in self._values():
            if isinstance(row, str):
                continue
            first = first or [str(key) for key in row]
            missing -= row.keys()
            if not missing:
                return
        if first:
            self._check_columns([column for column in first if column not in missing])

    def _values(self) -> Iterator[Mapping[str, Any] | str]:
        for index in range(len(self._rows)):
            try:
                yield self._rows[index]
            except ValueError as error:
                yield getattr(error, "reason", str(error))
        if self._rows.damage is not None:
            yield self._rows.damage.reason


class ParquetSource(TableSource):
    """A Parquet file with images as paths, as bytes of files, or as Hugging Face's structure of both."""

    def __init__(self, name: str, options: SourceOptions) -> None:
        super().__init__(name, options)
        with needs("pyarrow", "Parquet", EXTRA):
            import pyarrow as pa
            import pyarrow.parquet as pq
        try:
            with pq.ParquetFile(name) as file:
                self._count = file.metadata.num_rows
                columns = file.schema_arrow.names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not a Parquet file, or it is damaged: {error}") from error
        self._check_columns(columns)

    def _values(self) -> Iterator[Mapping[str, Any] | str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = list(self._used())
        done = 0
        try:
            with pq.ParquetFile(self.name) as file:
                for part in file.iter_batches(_PARQUET_ROWS, columns=columns):
                    yield from part.to_pylist()
                    done += part.num_rows
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            for _ in range(self._count - done):
                yield f"the file cannot be read from row {done} on: {error}"


def open_table(name: str, options: SourceOptions) -> TableSource:
    """Return the table in a file, by its suffix.

    Raises:
        ValueError, OSError, ImportError: see `TableSource`; or the package that reads it is not installed.
    """
    kinds = {".csv": CsvSource, ".tsv": CsvSource, ".parquet": ParquetSource}
    return kinds.get(Path(name).suffix.lower(), JsonSource)(name, options)
