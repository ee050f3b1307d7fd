# SPDX-License-Identifier: Apache-2.0
"""The journal of a run: what is done, on the disk before the run goes on, so that a run can be killed at any moment.

The first line says what the run is, each further one holds the rows of one whole batch. Lines are only ever appended.
One that was cut off by a kill lacks its end and is dropped, so a batch is there entirely or not at all.
"""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Journal", "JournalError", "json_line", "sync_folder"]

FORMAT = 1


class JournalError(ValueError):
    """A journal that cannot be gone on with; the message says why and what to do."""


class Journal:
    """An open journal, which no other process has open.

    Args:
        path: of the file; it is created, or gone on with.
        run: what the run is: JSON values by name. A run that is gone on with must have the same.
        restart: throw away what the file holds.
        replaces: state of the output that the run may replace, see `outputs.state_of`; what a run that is gone on with
            was allowed to replace counts in place of it.

    Attributes:
        batches: how many are done.
        rows: how many those have.
        replaces: as above.

    Raises:
        JournalError: the file is of another run, is damaged before its end, is no journal, or is in use.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], restart: bool = False, replaces: Any = None) -> None:
        self.path, self.replaces = path, replaces
        self.batches = self.rows = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        try:
            self._lock()
            end = 0 if restart else self._read(run)
            os.ftruncate(self._file, end)
            os.lseek(self._file, end, os.SEEK_SET)
            if end == 0:
                self._append({"fastvlm_batch": FORMAT, "run": run, "replaces": replaces})
                sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, rows: list[dict[str, Any]], files: Sequence[Any] = ()) -> None:
        """Write the rows of the next batch; when this returns, they are on the disk.

        Args:
            rows: of the batch.
            files: states of the files that its pictures were in, see `outputs.state_of`.
        """
        self._append({"batch": self.batches, "rows": rows, "files": list(files)})
        self.batches += 1
        self.rows += len(rows)

    def files(self) -> Iterator[list[Any]]:
        """Yield the states of files that each batch was appended with."""
        with open(self.path, "rb") as file:
            file.readline()
            for line in itertools.islice(file, self.batches):
                yield json.loads(line).get("files", [])

    def in_order(self) -> Iterator[dict[str, Any]]:
        """Yield all rows, ordered by their `index`, which is taken out; only those of a few batches are in memory."""
        waiting: dict[int, dict[str, Any]] = {}
        following = 0
        with open(self.path, "rb") as file:
            file.readline()
            for line in file:
                waiting.update((row.pop("index"), row) for row in json.loads(line)["rows"])
                while following in waiting:
                    yield waiting.pop(following)
                    following += 1
        if waiting:
            raise JournalError(f"{self.path} lacks row {following}; begin again with --restart.")

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Delete the file, when what it holds is elsewhere."""
        if os.name == "nt":
            self.close()
        os.unlink(self.path)
        self.close()

    def _append(self, value: dict[str, Any]) -> None:
        line = memoryview(json_line(value))
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)

    def _lock(self) -> None:
        """Keep other processes out; the system lifts the lock when this one ends, however it ends."""
        try:
            import fcntl
        except ImportError:  # Windows has no such locks
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except (BlockingIOError, FileNotFoundError):
            ours = False  # in the latter case it was removed meanwhile, by a run that has just ended
        if not ours:
            raise JournalError(f"{self.path} is in use by another fastvlm batch; wait until that ends.")

    def _read(self, run: Mapping[str, Any]) -> int:
        """Count what is done and return where the next line belongs; where nothing is done, that is the start."""
        size, end = os.fstat(self._file).st_size, 0
        differences: list[str] = []
        replaces = None
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                    if not isinstance(value, dict):
                        raise ValueError("not an object")
                    if end:
                        self._take(value)
                    else:
                        differences = self._compare(value, run)
                        replaces = value.get("replaces")
                except JournalError:
                    raise
                except (ValueError, KeyError, TypeError) as error:
                    if end + len(line) == size:
                        break  # cut off by a kill
                    raise JournalError(
                        f"{self.path} is damaged at byte {end}; begin again with --restart, or name another output."
                    ) from error
                end += len(line)
        if not self.batches:
            return 0
        if differences:
            raise JournalError(
                f"{self.path.name} is of a run with {'; '.join(differences)}. Give what the run began with, or begin "
                "again with --restart."
            )
        self.replaces = replaces
        return end

    def _compare(self, value: dict[str, Any], run: Mapping[str, Any]) -> list[str]:
        """Return how the run of the first line differs from this one."""
        if value.get("fastvlm_batch") != FORMAT:
            raise JournalError(
                f"{self.path} is not the journal of this version's fastvlm batch. Name another output, or begin again "
                "with --restart, which overwrites it."
            )
        return list(_differences(value["run"], json.loads(json.dumps(run))))

    def _take(self, value: dict[str, Any]) -> None:
        """Count the batch of a further line."""
        if value["batch"] != self.batches:
            raise ValueError(f"batch {value['batch']} follows {self.batches} others")
        self.rows += len(value["rows"])
        self.batches += 1


def json_line(value: Mapping[str, Any]) -> bytes:
    """Return a value as a line of JSONL; half a character, as of a name that is no UTF-8, becomes its JSON escape."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on the disk, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs between the run that a journal is of and this one."""
    for name in dict.fromkeys((*before, *now)):
        was, is_now = before.get(name), now.get(name)
        if was == is_now:
            continue
        if name == "inputs" and was and is_now:
            yield from _input_differences(was, is_now)
        elif name == "model_files":
            yield "other files of the model under the same name"
        else:
            yield f"{name} {was!r}, not {is_now!r}"


def _input_differences(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[str]:
    names = [[source["name"] for source in sources] for sources in (before, now)]
    if names[0] != names[1]:
        yield f"the inputs {', '.join(names[0])}, not {', '.join(names[1])}"
        return
    for was, is_now in zip(before, now, strict=True):
        if was["count"] != is_now["count"]:
            yield f"{was['count']:,} files or rows of {was['name']}, which now has {is_now['count']:,}"
        elif was != is_now:
            yield f"other content of {was['name']}"
