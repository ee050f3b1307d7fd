# SPDX-License-Identifier: Apache-2.0
"""The journal of a run: what is done, on the disk before the run goes on, so that it can be killed at any moment.

The first line says which tool's the file is, each further one holds one batch. Lines are only ever appended. One that
was cut off by a kill lacks its end and is dropped, so a batch is there entirely or not at all.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .atomic_files import sync_directory

__all__ = ["JournalError", "JournalFile", "json_line"]

FORMAT = 1


class JournalError(ValueError):
    """A journal that cannot be used; the message says why and what to do."""


class JournalFile:
    """An open journal, which no other process has open.

    Args:
        path: of the file; it is created where there is none.
        restart: throw away what the file holds, whatever it is.

    Attributes:
        kind: the first key of the first line, by which a tool knows its own; of each subclass.
        header: further keys of the first line; None for a file that has none yet, which `begin` writes.

    Raises:
        JournalError: the file is no journal of this kind, is damaged before its end, or is in use.
        OSError: it cannot be read or written.
    """

    kind = "fastvlm"

    def __init__(self, path: Path, restart: bool = False) -> None:
        self.path = path
        self.header: dict[str, Any] | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags, 0o666)
        try:
            if not _lock(self._file, path):
                raise JournalError(f"{path} is in use by another run; wait until that ends, or name another output.")
            os.ftruncate(self._file, 0 if restart else self._read())
        except BaseException:
            self.close()
            raise

    def take(self, batch: Any) -> None:
        """Note a batch that is there already; ValueError, KeyError or TypeError say that its line is damaged."""

    def begin(self, header: Mapping[str, Any]) -> None:
        """Write the first line, in place of all that is there."""
        os.ftruncate(self._file, 0)
        self.append_line({self.kind: FORMAT, **header})
        sync_directory(self.path.parent)
        self.header = dict(header)

    def append_line(self, value: Any) -> None:
        """Write a line; when this returns, it is on the disk."""
        line = memoryview(json_line(value))
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)

    def lines(self) -> Iterator[Any]:
        """Yield the batches, one at a time; nothing may be appended meanwhile."""
        for number, line in enumerate(self._raw_lines()):
            if number:
                yield json.loads(line)

    def close(self) -> None:
        """Let go of the file; a second time does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Delete the file, when what it holds is elsewhere."""
        if os.name == "nt":  # which deletes no open file
            self.close()
        os.unlink(self.path)
        self.close()

    def _raw_lines(self) -> Iterator[bytes]:
        # By the one descriptor: on Windows no other may read the byte that is locked.
        os.lseek(self._file, 0, os.SEEK_SET)
        with open(self._file, "rb", closefd=False) as file:
            yield from file

    def _read(self) -> int:
        """Take what is there and return where the next line belongs."""
        size, end = os.fstat(self._file).st_size, 0
        beginning = json_line({self.kind: FORMAT})[:-2]
        for line in self._raw_lines():
            if not end and not (line.startswith(beginning) or beginning.startswith(line)):
                raise JournalError(
                    f"{self.path} is not a journal of this version's {self.kind.replace('_', ' ')}. Delete it to "
                    "begin again, or name another output."
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
                    f"{self.path} is damaged at byte {end}. Delete it to begin again, or name another output."
                ) from error
            end += len(line)
        return end


def json_line(value: Any) -> bytes:
    """Return a value as a line of JSONL; half a character, as of a name that is no UTF-8, becomes its JSON escape."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _lock(file: int, path: Path) -> bool:
    """Keep other processes out until this one ends, however it ends; return whether that succeeded."""
    try:
        try:
            import fcntl
        except ImportError:  # on Windows
            import msvcrt

            os.lseek(file, 0, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Otherwise it was removed meanwhile, by a run that has just ended.
        return os.path.samestat(os.fstat(file), os.stat(path))
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False
