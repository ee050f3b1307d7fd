# SPDX-License-Identifier: Apache-2.0
"""Outputs of vectors: Parquet, or a NumPy array with a file that describes its rows."""

import base64
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.atomic_files import replacing
from ..storage.journal_file import json_line
from .outputs import Outputs, require_format, require_pyarrow
from .requests import Request

__all__ = ["VECTOR_COLUMNS", "VectorOutputs", "packed", "vector_row"]

VECTOR_COLUMNS = ("source", "row", "image", "time", "text", "vector", "error")
"""Columns of the output."""

VECTOR_FORMATS = (".parquet", ".npy")
_ROWS_A_PART = 1024


def packed(vector: np.ndarray) -> str:
    """Return a float32 vector as text for a journal, without rounding."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def vector_row(request: Request, vector: str | None, error: str | None) -> dict[str, Any]:
    """Return the row of a request, with the keys `VECTOR_COLUMNS` in that order; the vector is packed."""
    values = (request.source, request.row, request.image, request.time, request.question or None, vector, error)
    return dict(zip(VECTOR_COLUMNS, values, strict=True))


class VectorOutputs(Outputs):
    """The files that a run writes: OUT.parquet, or OUT.npy with OUT.ids.jsonl.

    Args:
        path: path of the output.

    Raises:
        ValueError, FileNotFoundError, ImportError: see `require_format`.
    """

    def __init__(self, path: Path) -> None:
        require_format(path, VECTOR_FORMATS)
        self.is_array = path.suffix.lower() == ".npy"
        self.ids = path.with_suffix(".ids.jsonl")
        super().__init__(path, {"ids": self.ids} if self.is_array else {})

    def write_vectors(
        self, rows: Callable[[], Iterable[dict[str, Any]]], count: int, replaces: Mapping[str, Any]
    ) -> None:
        """Write all rows.

        Args:
            rows: returns the rows in order, each with `VECTOR_COLUMNS`, each time that it is called.
            count: number of rows.
            replaces: `states` of files that may be replaced.

        Raises:
            FileExistsError: another file with other contents exists; it is not changed.
        """
        state = (replaces.get(str(self.rows)),)
        if not self.is_array:
            self._write_parquet(rows(), state)
            return
        width = next((len(_unpacked(row["vector"])) for row in rows() if row["vector"]), 0)
        missing = np.full(width, np.nan, dtype="<f4")
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
        with replacing(self.ids, (replaces.get(str(self.ids)),)) as ids, replacing(self.rows, state) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for row in rows():
                vector = row.pop("vector")
                file.write((missing if vector is None else _unpacked(vector)).tobytes())
                ids.write(json_line(row))

    def _write_parquet(self, rows: Iterable[dict[str, Any]], state: tuple[Any, ...]) -> None:
        pa, pq = require_pyarrow()
        types = {"row": pa.int64(), "time": pa.float64(), "vector": pa.list_(pa.float32())}
        schema = pa.schema([(name, types.get(name, pa.string())) for name in VECTOR_COLUMNS])
        remaining = _with_arrays(rows)
        with replacing(self.rows, state) as file, pq.ParquetWriter(file, schema) as writer:
            while part := list(itertools.islice(remaining, _ROWS_A_PART)):
                writer.write_table(pa.Table.from_pylist(part, schema=schema))


def _with_arrays(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {**row, "vector": None if row["vector"] is None else _unpacked(row["vector"])}


def _unpacked(vector: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(vector), dtype="<f4")
