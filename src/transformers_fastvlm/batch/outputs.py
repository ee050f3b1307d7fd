# SPDX-License-Identifier: Apache-2.0
"""What a run leaves: JSONL, Parquet or subtitles, each written beside its place and moved there when it is whole."""

import contextlib
import filecmp
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from .batch_journal import json_line, sync_folder

__all__ = ["FORMATS", "require_format", "state_of", "subtitles", "write_rows", "write_subtitles"]

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
    if path.exists() and not path.is_file():
        raise ValueError(f"the output {str(path)!r} is no regular file; expected the name of a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the output's folder {str(path.parent)!r} does not exist; make it first.")
    if path.suffix.lower() == ".parquet":
        _pyarrow()


def state_of(path: str | os.PathLike[str]) -> list[int] | None:
    """Return what changes when a file does: its size and modification time; None if there is no file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], replaces: Any = None) -> None:
    """Write rows as JSONL or Parquet, by the suffix.

    Args:
        path: of the file.
        rows: all with the keys of `running.COLUMNS`, in that order.
        replaces: the state of a file in its place that may be replaced, see `state_of`; None if there was none.

    Raises:
        FileExistsError: another file is there, which is left as it is, unless it holds just this.
    """
    if path.suffix.lower() == ".parquet":
        _write_parquet(path, rows, replaces)
        return
    with _replacing(path, replaces) as file:
        for row in rows:
            file.write(json_line(row))


def write_subtitles(path: Path, rows: Iterable[Mapping[str, Any]], every: float, replaces: Any = None) -> None:
    """Write the rows of one video as SRT; see `subtitles` and `write_rows`."""
    with _replacing(path, replaces) as file:
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
def _replacing(path: Path, replaces: Any) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its place at the end, on the disk, or goes away after an error.

    Where `path` is a link, that is the place of what it leads to. What appeared there meanwhile is not replaced.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # The same bytes are there where an earlier process was killed just after this.
        if state_of(path) not in (None, replaces) and not filecmp.cmp(path, partial, shallow=False):
            raise FileExistsError(
                f"{str(path)!r} appeared, or was changed, since the run began, and is not replaced. Move it away and "
                "give the same command again; what was done is kept."
            )
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]], replaces: Any) -> None:
    pa, pq = _pyarrow()
    text, number, real = pa.string(), pa.int64(), pa.float64()
    types = {"row": number, "time": real, "prompt_tokens": number, "completion_tokens": number}
    from .batch_run import COLUMNS

    schema = pa.schema([(name, types.get(name, text)) for name in COLUMNS])
    remaining = iter(rows)
    with _replacing(path, replaces) as file, pq.ParquetWriter(file, schema) as writer:
        while part := list(itertools.islice(remaining, _ROWS_A_PART)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('Parquet needs pyarrow: pip install "transformers-fastvlm[batch]".') from error
    return pa, pq
