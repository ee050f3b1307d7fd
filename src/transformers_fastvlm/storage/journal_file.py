# SPDX-License-Identifier: Apache-2.0
"""The journal of a run: finished work, synced to disk before the run continues, so that it can be killed at any time.

The first line names the tool, each further line holds one batch. Lines are only appended. A line that a kill cut off
has no end and is dropped, so batches are recorded atomically.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .atomic_files import naming, sync_directory

__all__ = ["JournalError", "JournalFile", "json_line"]

FORMAT = 1


class JournalError(ValueError):
    """Error of a journal that cannot be used; the message says why and what to do."""


class JournalFile:
    """An open journal, locked against other processes.

    Args:
        path: path of the file; it is created if it does not exist.
        restart: discard the content of the file.

    Attributes:
        kind: first key of the first line, which names the tool; each subclass sets it.
        header: further keys of the first line; None until `begin` writes it.

    Raises:
        JournalError: the file is not a journal of this kind, is damaged before its end, or is in use.
        OSError: the file cannot be read or written.
    """

    kind = "fastvlm"

    def __init__(self, path: Path, restart: bool = False) -> None:
        self.path = path
        self.header: dict[str, Any] | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags, 0o666)
        try:
            if not _lock(self._file, path):
                raise JournalError(f"{path} is in use by another run; wait until it ends, or name another output.")
            os.ftruncate(self._file, 0 if restart else self._read())
        except BaseException:
            self.close()
            raise

    def take(self, batch: Any) -> None:
        """Take a recorded batch; raise ValueError, KeyError or TypeError if its line is damaged."""

    def begin(self, header: Mapping[str, Any]) -> None:
        """Replace the content of the file by the first line."""
        os.ftruncate(self._file, 0)
        self.append_line({self.kind: FORMAT, **header})
        sync_directory(self.path.parent)
        self.header = dict(header)

    def append_line(self, value: Any) -> None:
        """Write a line and sync it to disk."""
        line = memoryview(json_line(value))
        with naming(self.path):
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)

    def lines(self) -> Iterator[Any]:
        """Yield the batches, one at a time; do not append while iterating."""
        for number, line in enumerate(self._raw_lines()):
            if number:
                yield json.loads(line)

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Delete the file, after its content is stored elsewhere."""
        if os.name == "nt":  # Windows cannot delete an open file
            self.close()
        os.unlink(self.path)
        self.close()

    def _raw_lines(self) -> Iterator[bytes]:
        # Use the same descriptor: on Windows no other one may read the locked byte.
        os.lseek(self._file, 0, os.SEEK_SET)
        with open(self._file, "rb", closefd=False) as file:
            yield from file

    def _read(self) -> int:
        """Read the recorded batches and return the offset of the next line."""
        size, end = os.fstat(self._file).st_size, 0
        beginning = json_line({self.kind: FORMAT})[:-2]
        for line in self._raw_lines():
            if not end and not (line.startswith(beginning) or beginning.startswith(line)):
                raise JournalError(
                    f"{self.path} is not a journal of this version's {self.kind.replace('_', ' ')}. Delete it to "
                    "start over, or name another output."
                )
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
                if not isinstance(value, dict):
                    raise ValueError("not an object")
                if end:
                    self.take(value)
                else:
                    self.header = {name: value[name] for name in value if name != self.kind}
            except (ValueError, KeyError, TypeError) as error:
                if end + len(line) == size:
                    break  # cut off by a kill
                raise JournalError(
                    f"{self.path} is damaged at byte {end}. Delete it to start over, or name another output."
                ) from error
            end += len(line)
        return end


def json_line(value: Any) -> bytes:
    """Return a value as a line of JSONL; a lone surrogate, as in a name that is not UTF-8, becomes its JSON escape."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _lock(file: int, path: Path) -> bool:
    """Lock the file until this process ends; return whether that succeeded."""
    try:
        try:
            import fcntl
        except ImportError:  # on Windows
            import msvcrt

            os.lseek(file, 0, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The path differs if a run that has just ended removed the file.
        return os.path.samestat(os.fstat(file), os.stat(path))
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False
