# SPDX-License-Identifier: Apache-2.0
"""Outputs of a run: JSONL, Parquet or subtitles, written atomically."""

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._optional import needs
from ..storage.atomic_files import partial_of, replacing, state_of
from ..storage.journal_file import json_line
from .answer_fields import FIELDS, FieldType, column_values
from .batch_rows import COLUMNS
from .requests import EXTRA, printable
from .sources import Inputs

__all__ = ["FORMATS", "Outputs", "outputs_for", "require_format", "require_pyarrow", "subtitles", "write_rows"]

FORMATS = (".jsonl", ".parquet", ".srt")
_ROWS_A_PART = 8192


def require_format(path: Path, formats: Sequence[str] = FORMATS) -> None:
    """Check that an output can be written.

    Args:
        path: path of the output.
        formats: the suffixes that it may have.

    Raises:
        ValueError: its suffix is not one of them, or it is a folder.
        FileNotFoundError: its folder does not exist.
        ImportError: the package that writes it is not installed.
    """
    if path.suffix.lower() not in formats:
        raise ValueError(f"the output is {str(path)!r}; expected a name that ends in {', '.join(formats)}.")
    if path.is_dir():
        raise ValueError(f"the output {str(path)!r} is a folder; expected the name of a file.")
    if path.exists() and not path.is_file():
        raise ValueError(f"the output {str(path)!r} is not a regular file; expected the name of a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the output's folder {str(path.parent)!r} does not exist; create it first.")
    if path.suffix.lower() == ".parquet":
        require_pyarrow()


class Outputs:
    """The files that a run writes.

    Args:
        rows: file of all rows, or, if it ends in .srt, the subtitles of the only video.
        captions: file of subtitles of each video, by the video's name in the rows.
        fields: type of each field of the answers, which are columns of a table.

    Attributes:
        journal: the run's journal, beside `rows` or beside its target if `rows` is a link.
    """

    def __init__(self, rows: Path, captions: Mapping[str, Path], fields: Mapping[str, FieldType] | None = None) -> None:
        self.rows, self.captions, self.fields = rows, captions, fields or {}
        self._files = list(dict.fromkeys([rows, *captions.values()]))
        real = Path(os.path.realpath(rows))
        self.journal = real.with_name(real.name + ".journal")

    def states(self) -> dict[str, Any]:
        """Return the states of existing output files, by name; see `state_of`."""
        return {str(path): state for path in self._files if (state := state_of(path)) is not None}

    def refuse_inputs(self, inputs: Iterable[str]) -> None:
        """Refuse to overwrite inputs, under any name or link.

        Raises:
            ValueError: an output, or the journal, is one of the inputs.
        """
        written = [*self._files, *map(partial_of, self._files), self.journal]
        there = [path for path in written if path.exists()]
        for file in inputs if there else ():
            for path in there:
                if os.path.exists(file) and os.path.samefile(path, file):
                    raise ValueError(f"the output {str(path)!r} is the input {file!r}. Choose another output.")

    def write(self, rows: Iterable[dict[str, Any]], every: float, replaces: Mapping[str, Any]) -> None:
        """Write all rows, and the subtitles of each video.

        Args:
            rows: rows in order, each with `COLUMNS`.
            every: seconds between a video's frames.
            replaces: `states` of files that may be replaced.

        Raises:
            FileExistsError: another file with other contents exists; it is not changed.
        """
        shown: dict[str, list[dict[str, Any]]] = {name: [] for name in self.captions}

        def noted() -> Iterator[dict[str, Any]]:
            for row in rows:
                if row["source"] in shown:
                    shown[row["source"]].append({"time": row["time"], "answer": row["answer"]})
                yield row

        if self.rows.suffix.lower() == ".srt":
            deque(noted(), maxlen=0)
        else:
            write_rows(self.rows, noted(), replaces.get(str(self.rows)), self.fields)
        for name, path in self.captions.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, (replaces.get(str(path)),)) as file:
                for block in subtitles(shown[name], every):
                    file.write(block.encode("utf-8", "backslashreplace"))


def outputs_for(
    rows: Path,
    found: Inputs,
    folder: str | os.PathLike[str] | None,
    fields: Mapping[str, FieldType] | None = None,
) -> Outputs:
    """Return the files that a run over inputs writes.

    Args:
        rows, fields: see `Outputs`.
        found: the inputs.
        folder: folder for the subtitles of videos; None for none.

    Raises:
        ValueError, FileNotFoundError, ImportError: see `require_format`; or the inputs do not fit subtitles.
    """
    require_format(rows)
    videos = found.videos()
    if rows.suffix.lower() == ".srt":
        if len(videos) != 1 or not found.only_videos() or folder is not None:
            raise ValueError(
                f"the output {str(rows)!r} is a subtitle file, which needs one video as the only input, but there are "
                f"{len(videos)} videos. Use a .jsonl file, and a folder with --srt."
            )
        return Outputs(rows, {printable(videos[0]): rows})
    if folder is None:
        return Outputs(rows, {}, fields)
    files = {printable(video): Path(folder) / f"{Path(video).stem}.srt" for video in videos}
    if not files:
        raise ValueError("--srt writes the captions of videos, but the inputs have no video.")
    if len(set(files.values())) < len(videos):
        raise ValueError(
            "two videos have the same name, so one subtitle file would replace the other. Run them separately."
        )
    return Outputs(rows, files, fields)


def write_rows(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    replaces: Any = None,
    fields: Mapping[str, FieldType] | None = None,
) -> None:
    """Write rows as JSONL or Parquet, by the suffix.

    Args:
        path: path of the file.
        rows: rows with the keys `COLUMNS`, in that order, and `FIELDS` if the answers follow a JSON schema.
        replaces: state of an existing file that may be replaced, see `state_of`; None if there was none.
        fields: type of each field of the answers; Parquet has a column for each.

    Raises:
        FileExistsError: another file with other contents exists; it is not changed.
    """
    if path.suffix.lower() == ".parquet":
        _write_parquet(path, rows, replaces, fields or {})
        return
    with replacing(path, (replaces,)) as file:
        for row in rows:
            file.write(json_line(row))


def subtitles(rows: Iterable[Mapping[str, Any]], every: float) -> Iterator[str]:
    """Yield the blocks of a SubRip file.

    Each answer is shown on one line until the next frame, the last one for `every` seconds. Frames without an answer
    have no block.

    Args:
        rows: rows of one video, in order.
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


def _write_parquet(
    path: Path, rows: Iterable[Mapping[str, Any]], replaces: Any, fields: Mapping[str, FieldType]
) -> None:
    pa, pq = require_pyarrow()
    text, number, real = pa.string(), pa.int64(), pa.float64()
    types = {"row": number, "time": real, "prompt_tokens": number, "completion_tokens": number}
    kinds = {"string": text, "integer": number, "number": real, "boolean": pa.bool_(), "json": text}
    columns = [(name, types.get(name, text)) for name in COLUMNS]
    schema = pa.schema([*columns, *((f"{FIELDS}.{name}", kinds[kind]) for name, kind in fields.items())])
    remaining = ({**row, **column_values(row.get(FIELDS), fields)} for row in rows)
    with replacing(path, (replaces,)) as file, pq.ParquetWriter(file, schema) as writer:
        while part := list(itertools.islice(remaining, _ROWS_A_PART)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))


def require_pyarrow() -> tuple[Any, Any]:
    """Return the modules `pyarrow` and `pyarrow.parquet`.

    Raises:
        ImportError: pyarrow is not installed.
    """
    with needs("pyarrow", "Parquet", EXTRA):
        import pyarrow as pa
        import pyarrow.parquet as pq
    return pa, pq
