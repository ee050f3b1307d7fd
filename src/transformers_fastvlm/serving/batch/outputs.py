# SPDX-License-Identifier: Apache-2.0
"""What a run leaves: JSONL, Parquet or subtitles, each written beside its place and moved there when it is whole."""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from .journal import json_line, sync_folder

__all__ = ["FORMATS", "require_format", "subtitles", "write_rows", "write_subtitles"]

FORMATS = (".jsonl", ".parquet", ".srt")
_ROWS_A_PART = 8192


def require_format(path: Path) -> None:
    """Check that an output can be written.

    Raises:
        ValueError: its suffix is none of `FORMATS`, or its place is a folder.
        FileNotFoundError: its folder does not exist.
        ImportError: what writes it is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the output is {str(path)!r}; expected a name that ends in {', '.join(FORMATS)}.")
    if path.is_dir():
        raise ValueError(f"the output {str(path)!r} is a folder; expected the name of a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the output's folder {str(path.parent)!r} does not exist; make it first.")
    if path.suffix.lower() == ".parquet":
        _pyarrow()


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL or Parquet, by the suffix.

    Args:
        path: of the file, which is replaced if it is there.
        rows: all with the keys of `running.COLUMNS`, in that order.
    """
    if path.suffix.lower() == ".parquet":
        _write_parquet(path, rows)
        return
    with _replacing(path) as file:
        for row in rows:
            file.write(json_line(row))


def write_subtitles(path: Path, rows: Iterable[Mapping[str, Any]], every: float) -> None:
    """Write the rows of one video as SRT; see `subtitles`."""
    with _replacing(path) as file:
        for block in subtitles(rows, every):
            file.write(block.encode("utf-8", "backslashreplace"))


def subtitles(rows: Iterable[Mapping[str, Any]], every: float) -> Iterator[str]:
    """Yield the blocks of a SubRip file.

    An answer is shown, on one line, until the next frame, that of the last frame for `every` seconds. Frames without
    an answer show nothing.

    Args:
        rows: of one video, in order.
        every: seconds between frames.
    """
    shown = [row for row in rows if row["time"] is not None]
    number = 0
    for row, following in itertools.zip_longest(shown, shown[1:]):
        text = " ".join((row["answer"] or "").split()).replace("-->", "→")
        if not text:
            continue
        number += 1
        end = following["time"] if following else row["time"] + every
        yield f"{number}\n{_clock(row['time'])} --> {_clock(end)}\n{text}\n\n"


def _clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02},{rest % 1000:03}"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its place at the end, on the disk, or goes away after an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    pa, pq = _pyarrow()
    text, number, real = pa.string(), pa.int64(), pa.float64()
    types = {"row": number, "time": real, "prompt_tokens": number, "completion_tokens": number}
    from .running import COLUMNS

    schema = pa.schema([(name, types.get(name, text)) for name in COLUMNS])
    remaining = iter(rows)
    with _replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        while part := list(itertools.islice(remaining, _ROWS_A_PART)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('Parquet needs pyarrow: pip install "transformers-fastvlm[batch]".') from error
    return pa, pq
