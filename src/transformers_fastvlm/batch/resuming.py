# SPDX-License-Identifier: Apache-2.0
"""Runs that can be stopped and resumed: their identity, and the lifetime of their journal."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint_identity import checkpoint_identity
from .batch_journal import BatchJournal
from .batch_rows import counted
from .outputs import Outputs
from .sources import Inputs

__all__ = ["Interrupted", "identity_of", "resumable"]


class Interrupted(Exception):
    """The user stopped the run; the finished rows are in the journal.

    Attributes:
        rows: number of finished rows.
        journal: the journal's file.
    """

    def __init__(self, rows: int, journal: Path) -> None:
        super().__init__(f"stopped after {counted(rows, 'row')}.")
        self.rows, self.journal = rows, journal


@contextlib.contextmanager
def resumable(outputs: Outputs, identity: Mapping[str, Any], restart: bool) -> Iterator[BatchJournal]:
    """Open the journal of a run, which resumes a run of the same identity; the journal is removed at the end.

    After an error it is kept, if the run has finished any batch.

    Args:
        outputs: files that the run writes.
        identity: what must not change when the run is resumed, as JSON values by name.
        restart: discard an existing journal, and replace existing outputs at the end.

    Raises:
        FileExistsError: an output exists that no interrupted run would replace.
        JournalError: see `BatchJournal`.
    """
    there = outputs.states()
    if there and not restart and not outputs.journal.exists():
        raise _exists(there)
    with BatchJournal(outputs.journal, identity, restart, there) as journal:
        if there and not restart and not journal.batches:
            raise _exists(there)  # the journal's run had finished nothing
        yield journal
        journal.remove()


def identity_of(
    found: Inputs, about: Mapping[str, Any], options: Mapping[str, Any], reading: Callable[[int, int], None]
) -> dict[str, Any]:
    """Return the identity of a run, which must not change when it is resumed.

    Args:
        found: the inputs.
        about: what else the rows depend on; the files of its "model" count too, if it has one.
        options: options of the run.
        reading: called with the bytes read so far and in all: first of tables and text files, then of the model's.
    """
    identity = {**about, **options, "inputs": found.identity(reading)}
    if (model := about.get("model")) is not None:
        identity["model_files"] = checkpoint_identity(str(model), reading)
    return identity


def _exists(there: Iterable[str]) -> FileExistsError:
    return FileExistsError(
        f"{next(iter(there))!r} exists already, and a finished output is never extended. For new images, use another "
        "output, and merge the files afterwards. To answer everything again, use --restart."
    )
