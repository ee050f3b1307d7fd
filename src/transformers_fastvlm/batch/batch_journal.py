# SPDX-License-Identifier: Apache-2.0
"""The journal of `fastvlm batch`: the identity of the run, and the rows of each finished batch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..storage.journal_file import JournalError, JournalFile

__all__ = ["BatchJournal"]


class BatchJournal(JournalFile):
    """An open journal, locked against other processes.

    As a context manager it is closed at the end, and removed after an error if it has no batch.

    Args:
        path: path of the file, which is created or resumed.
        run: identity of the run: JSON values by name. A resumed run must have the same.
        restart: discard the file's contents.
        replaces: states of the outputs that the run may replace, see `state_of`; a resumed run keeps its own.

    Attributes:
        batches: number of finished batches.
        rows: number of their rows.
        replaces: as above.

    Raises:
        JournalError: the file belongs to another run, is damaged before its end, is not a journal, or is in use.
        OSError: it cannot be read or written.
    """

    kind = "fastvlm_batch"

    def __init__(self, path: Path, run: Mapping[str, Any], restart: bool = False, replaces: Any = None) -> None:
        self.batches = self.rows = 0
        super().__init__(path, restart)
        try:
            if self.batches:
                self._compare(run)
            else:
                self.begin({"run": run, "replaces": replaces})
            self.replaces = (self.header or {}).get("replaces")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "BatchJournal":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None and not self.batches:
            self.remove()
        self.close()

    def append(self, rows: Sequence[Mapping[str, Any]], states: Sequence[Any] = ()) -> None:
        """Write the rows of the next batch to disk.

        Args:
            rows: rows of the batch.
            states: states of its images' files, see `state_of`.
        """
        self.append_line({"batch": self.batches, "rows": rows, "files": list(states)})
        self.batches += 1
        self.rows += len(rows)

    def states(self) -> Iterator[tuple[int, Any]]:
        """Yield the `index` of each row and the state of its image's file."""
        for batch in self.lines():
            for row, state in zip(batch["rows"], batch["files"], strict=True):
                yield row["index"], state

    def in_order(self) -> Iterator[dict[str, Any]]:
        """Yield all rows in the order of `index`, which is removed; in memory are only those that wait for another."""
        waiting: dict[int, dict[str, Any]] = {}
        following = 0
        for batch in self.lines():
            waiting.update((row.pop("index"), row) for row in batch["rows"])
            while following in waiting:
                yield waiting.pop(following)
                following += 1
        if waiting:
            raise JournalError(f"{self.path} lacks row {following}; start again with --restart.")

    def take(self, batch: Any) -> None:
        """Count a stored batch."""
        if batch["batch"] != self.batches:
            raise ValueError(f"batch {batch['batch']} is stored as number {self.batches}")
        self.rows += len(batch["rows"])
        self.batches += 1

    def _compare(self, run: Mapping[str, Any]) -> None:
        before = (self.header or {}).get("run") or {}
        if differences := list(_differences(before, json.loads(json.dumps(run)))):
            raise JournalError(
                f"{self.path.name} belongs to a run with {'; '.join(differences)}. Repeat the original command, or "
                "start again with --restart."
            )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences between a journal's run and this one."""
    for name in dict.fromkeys((*before, *now)):
        was, is_now = before.get(name), now.get(name)
        if was == is_now:
            continue
        if name == "inputs" and was and is_now:
            yield from _input_differences(was, is_now)
        elif name == "model_files":
            yield "different model files under the same name"
        elif name == "schema":
            yield "a different answer schema" if was and is_now else f"{'an' if was else 'no'} answer schema"
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
            yield f"different content in {was['name']}"
