# SPDX-License-Identifier: Apache-2.0
"""Rows of a JSON or JSONL file, indexed by byte offsets and parsed on access.

The index takes twelve bytes per row, so a file of ten million rows can be trained on, and the workers of a data loader
share it.
"""

import json
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..storage.digests import file_digest
from .rows import Rows
from .sample_errors import Place, SampleError, shortened

__all__ = ["JsonRows"]

CHUNK = 2**24
"""Bytes of a file that are read at once while indexing."""
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_SHORTEST_ROW = len('{"messages":[]}')
_CUT = "is cut off"
_OTHER_FORMATS = {
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"PAR1": "a Parquet file; rename it to end in .parquet",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch the file with git lfs pull",
}
_OPEN_ENDS = (b"{", b"[", b",", b":")
_LONGEST_LITERAL = len("-Infinity") + 1


class JsonRows(Rows):
    """The rows of a file that holds one list of objects, or one object per line.

    The first character tells the two apart, not the file's name. Empty lines are skipped.

    Attributes:
        damage: why the rows end too early, for instance after an interrupted download; None if they do not.

    Raises:
        SampleError: the file is empty, not UTF-8, or not JSON.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.name = Path(path), str(Path(path))
        self._line_numbers: np.ndarray | None = None
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        with open(self.path, "rb") as file:
            head = file.read(4096)
            if head.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise SampleError(f"{self.path} is UTF-16; expected JSON in UTF-8. Convert it first.")
            offset = len(_BOM) if head.startswith(_BOM) else 0
            first = head[offset:].lstrip(_SPACE)[:1]
            if other := next((what for start, what in _OTHER_FORMATS.items() if head.startswith(start)), None):
                raise SampleError(f"{self.path} is {other}.")
            if first not in (b"[", b"{") and self.path.suffix.lower() in (".csv", ".tsv"):
                raise SampleError(f"{self.path} is a table; expected JSON or JSONL, one row {{…}} per line.")
            if first not in (b"[", b"{"):
                raise SampleError(
                    f"{self.path} {'is empty' if not head.strip() else f'starts with {head[:20]!r}'}; expected a JSON "
                    "list of rows, [{…}, …], or JSONL, one row {…} per line."
                )
            file.seek(offset)
            self.is_list = first == b"["
            if self.is_list:
                self._starts, self._sizes = self._index_list(file)
            else:
                self._starts, self._sizes = self._index_lines(file)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row of the file, unchanged.

        Raises:
            SampleError: the row is not valid JSON, or not an object.
        """
        content = self._read(int(self._starts[row]), int(self._sizes[row]))
        try:
            value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise SampleError(self._why(error, content), self.place(row)) from error
        if not isinstance(value, dict):
            raise SampleError(f"the row is a JSON {type(value).__name__}; expected an object.", self.place(row))
        return value

    def place(self, row: int, sample_id: str | None = None) -> Place:
        line = None
        if not self.is_list:
            line = row + 1 if self._line_numbers is None else int(self._line_numbers[row])
        return Place(self.name, row, line, sample_id)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_descriptor")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _descriptor=None)

    def _read(self, start: int, size: int) -> bytes:
        """Return bytes of the file; safe for concurrent threads and for processes that inherited the file."""
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                weakref.finalize(self, os.close, self._descriptor)
            if not hasattr(os, "pread"):  # Windows: all threads share one file position
                os.lseek(self._descriptor, start, os.SEEK_SET)
                return os.read(self._descriptor, size)
        return os.pread(self._descriptor, size, start)

    def files(self) -> Sequence[str]:
        return [str(self.path)]

    def digest(self, advance: Callable[[int], None]) -> str:
        return file_digest(self.path, advance)

    def _why(self, error: Exception, content: bytes) -> str:
        if isinstance(error, UnicodeDecodeError):
            byte = f"its byte {error.start} is {content[error.start]:#04x}"
            return f"the row is not UTF-8 ({byte}). Convert the file first."
        if isinstance(error, json.JSONDecodeError):
            at = f"{error.msg} at character {error.pos} of {len(error.doc)}"
            cut = error.pos >= len(error.doc) or error.msg.startswith("Unterminated string")
            how = _CUT if cut else "is not valid JSON"
            advice = "one complete object per line" if not self.is_list else "an object"
            return f"the row {how} ({at}); expected {advice}. Download or write the file again."
        if isinstance(error, SampleError):
            return error.reason
        if isinstance(error, ValueError):
            return "the row has a number with more digits than Python reads. Write it as text, or remove it."
        return "the row is nested too deeply to be read."

    # Indexing

    def _index_lines(self, file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
        first = file.tell()
        breaks: list[np.ndarray] = []
        position = first
        while chunk := file.read(CHUNK):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + position)
            position += len(chunk)
        ends = np.concatenate(breaks) if breaks else np.empty(0, np.int64)
        if not len(ends) or ends[-1] != position - 1:
            ends = np.append(ends, position)
        starts = np.concatenate([[first], ends[:-1] + 1]).astype(np.int64)
        sizes = ends - starts
        keep = np.ones(len(starts), bool)
        for line in np.flatnonzero(sizes < _SHORTEST_ROW):
            file.seek(int(starts[line]))
            keep[line] = bool(file.read(int(sizes[line])).strip(_SPACE))
        if not keep.all():
            self._line_numbers = np.flatnonzero(keep) + 1
        starts, sizes = starts[keep], sizes[keep]
        self._starts, self._sizes = starts, sizes
        if len(starts) > 1 and self._read(int(starts[0]), int(sizes[0])).rstrip(_SPACE).endswith(_OPEN_ENDS):
            raise SampleError(
                f"{self.path} has an object that spans several lines; expected a JSON list of rows, [{{…}}, …], or "
                "JSONL, one complete row {…} per line."
            )
        try:
            self[len(starts) - 1]  # fails if the file is truncated
        except SampleError as error:
            if _CUT in error.reason:
                self.damage = error
                starts, sizes = starts[:-1], sizes[:-1]
        return starts, sizes.astype(np.uint32)

    def _index_list(self, file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
        starts: list[int] = []
        sizes: list[int] = []
        try:
            for start, end in _elements(file):
                starts.append(start)
                sizes.append(end - start)
        except json.JSONDecodeError as error:
            cut = error.doc == ""
            what = (
                f"the file ends inside this row, or before the list's closing ] (at byte {error.pos})"
                if cut
                else f"the JSON is not valid from byte {error.pos} on ({error.msg})"
            )
            self.damage = SampleError(f"{what}. Download or write the file again.", Place(self.name, len(starts)))
        return np.array(starts, np.int64), np.array(sizes, np.uint32)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object from its pairs; a plain JSON reader silently keeps the last of two values with the same key."""
    made = dict(pairs)
    if len(made) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise SampleError(f"the row has the key {shortened(key)} twice; keep one.")
    return made


def _elements(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield the start and end byte of each element of a JSON list.

    In Latin-1 each character is one byte, and JSON's structure is unchanged: only strings have bytes over 127.

    Raises:
        json.JSONDecodeError: `pos` is the byte in the file; `doc` is "" if the file is truncated.
    """
    decode = json.JSONDecoder(parse_int=str).raw_decode  # skipped numbers may have any length
    base = file.tell()
    text, at, ended = "", 0, False
    expected = "["

    def failed(message: str, position: int, cut: bool) -> json.JSONDecodeError:
        error = json.JSONDecodeError(message, "" if cut else "-", 0)
        error.pos = base + position
        return error

    while True:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        if len(text) - at < 2 and not ended:
            base, (text, ended), at = base + at, _more(file, text[at:]), 0
            continue
        if at == len(text):
            if expected == "":
                return
            raise failed("the list is not closed", at, True)
        character = text[at]
        if expected == "":
            raise failed("something follows the list", at, False)
        if character == "]" and expected in (",", "[first"):
            at, expected = at + 1, ""
        elif expected in ("[", ","):
            if character != expected:
                raise failed(f"expected {expected!r}, found {character!r}", at, False)
            at, expected = at + 1, "[first" if expected == "[" else "row"
        else:
            try:
                _, end = decode(text, at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string")
                if ended:
                    raise failed(error.msg, error.pos, unfinished or error.pos >= len(text.rstrip())) from error
                if not unfinished and error.pos <= len(text) - _LONGEST_LITERAL:
                    raise failed(error.msg, error.pos, False) from error
                base, (text, ended), at = base + at, _more(file, text[at:]), 0
                continue
            except RecursionError as error:
                raise failed("nested too deeply", at, False) from error
            yield base + at, base + end
            at, expected = end, ","


def _more(file: BinaryIO, text: str) -> tuple[str, bool]:
    """Return a text extended by at least its own length from the file, and whether the file has ended."""
    wanted = max(CHUNK, len(text))
    content = file.read(wanted)
    return text + content.decode("latin-1"), len(content) < wanted
