# SPDX-License-Identifier: Apache-2.0
"""Tables of pictures and questions: CSV, TSV, JSON, JSONL and Parquet.

A row that cannot be used becomes a request with an error; a table that cannot be opened, or lacks a column, raises.
"""

import csv
import functools
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
_LONGEST_NAME = 1024  # longer is no file's name, but a mistake such as base64


class TableSource:
    """A table whose rows name a picture each, and may have values for the prompt.

    Args:
        name: path of the file.
        options: how requests are made.

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

    def identity(self) -> dict[str, Any]:
        """Return name, number of rows, and a digest of the file."""
        return {"name": printable(self.name), "count": self.rows(), "digest": file_digest(self.name)}

    def rows(self) -> int:
        """Return the number of rows."""
        return self._count

    def _values(self) -> Iterator[Mapping[str, Any] | str]:
        """Yield each row, or why it cannot be read."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Request]:
        for index, row in enumerate(self._values()):
            yield self._request(index, row)

    def _request(self, index: int, row: Mapping[str, Any] | str) -> Request:
        source = printable(self.name)
        if isinstance(row, str):
            return Request(source=source, row=index, question=None, error=row)
        image = row.get(self.options.image_column)
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
                raise ValueError("the question has half a character (a lone surrogate). Write the file again.")
            question = filled
            if is_absent(image) or image == "":
                raise ValueError(f"column {self.options.image_column!r} is empty in this row; expected a picture.")
        except ValueError as error:
            return Request(source=source, row=index, image=label, question=question, error=str(error))
        if isinstance(image, bytes):
            image = {"bytes": image, "path": None}
        opened = functools.partial(self._images.open, image)
        file = self._images.path_of(image)
        return Request(source=source, row=index, image=label, file=file, question=question, picture=opened)

    def _check_columns(self, columns: Sequence[str]) -> None:
        for column in (self.options.image_column, *self._prompt.columns):
            if column not in columns:
                advice = " Name that of the images with --image-column." if column == self.options.image_column else ""
                raise ValueError(f"{self.name} has no column {column!r}; it has {listed(columns)}.{advice}")
            if columns.count(column) > 1:
                raise ValueError(f"{self.name} has several columns {column!r}; give each a name of its own.")


class _Lines:
    """The lines of a file, of which those of one record can be read again."""

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
        """Let what was read go, and return the number of the next line, counting from 1."""
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
        """Yield the fields of each record, or why it cannot be read; empty lines are passed over.

        A quote that is not closed takes in what follows. So after an error the record's first line is given up, and the
        next one begins a record.
        """
        delimiter = "\t" if self.name.lower().endswith(".tsv") else ","
        # Bytes that are no UTF-8 are kept apart, so that they spoil their own row only.
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
                yield f"the row has {len(fields)} fields; expected {len(self._columns)}, as the first line has."
            else:
                yield dict(zip(self._columns, fields, strict=True))


class JsonSource(TableSource):
    """A JSON list of objects, or JSONL with one a line."""

    def __init__(self, name: str, options: SourceOptions) -> None:
        super().__init__(name, options)
        self._rows = JsonRows(name)
        self._count = len(self._rows) + (self._rows.damage is not None)  # a row that is cut off is one
        self._check_keys()

    def _check_keys(self) -> None:
        """Refuse columns that no row has; in a table that is right the first one has all."""
        missing = {self.options.image_column, *self._prompt.columns}
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
    """A Parquet file, whose pictures are paths, files' bytes, or Hugging Face's structure of both."""

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

        columns = list(dict.fromkeys((self.options.image_column, *self._prompt.columns)))
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
        ValueError, OSError, ImportError: see `TableSource`; what reads it is not installed.
    """
    kinds = {".csv": CsvSource, ".tsv": CsvSource, ".parquet": ParquetSource}
    return kinds.get(Path(name).suffix.lower(), JsonSource)(name, options)
