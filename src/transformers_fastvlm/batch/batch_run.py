# SPDX-License-Identifier: Apache-2.0
"""A run over many images: sources → planning → opening → answering → journal → outputs, each image once."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint_identity import checkpoint_identity
from ..engines.base import Answer, Conversation, Sampling
from ..engines.engine import Engine
from ..images.decoding import FIRST_OF_SEVERAL
from .batch_journal import BatchJournal
from .batch_rows import Report, counted, row_of
from .opening import Opened, opened_ahead
from .outputs import outputs_for, require_format
from .planning import plan, skip_done
from .requests import SourceOptions
from .sources import Inputs, find_sources

__all__ = ["BatchOptions", "Interrupted", "run_batch"]


class Interrupted(Exception):
    """The user stopped the run; what was done is in the journal.

    Attributes:
        rows: how many are done.
        journal: file that they are kept in.
    """

    def __init__(self, rows: int, journal: Path) -> None:
        super().__init__(f"stopped after {counted(rows, 'row')}.")
        self.rows, self.journal = rows, journal


@dataclass(frozen=True, kw_only=True)
class BatchOptions(SourceOptions):
    """What a run is asked to do; see also `SourceOptions`.

    Args:
        system: message in place of the chat template's own.
        sampling: how answers are made. A row's seed is `sampling.seed` plus its index.
        batch_size: rows that are answered together, and lost at most where a run is killed.
    """

    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 16


def run_batch(
    inputs: Sequence[str],
    output: str | os.PathLike[str],
    load: Callable[[], Engine],
    options: BatchOptions,
    *,
    about: dict[str, Any],
    subtitles: str | os.PathLike[str] | None = None,
    restart: bool = False,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Report:
    """Ask a question about each picture and write the answers to one file.

    A journal beside the output, with `.journal` added to its name, has every batch on the disk before the next one
    begins. If it is there, that run is resumed. It is removed when the output is whole. Of an output that is a link,
    all that is about the file that it leads to.

    Args:
        inputs: files, folders, patterns and tables; see `find_sources`.
        output: ends in .jsonl or .parquet, or, for a single video, in .srt.
        load: makes the engine; not called where nothing is left to answer.
        options: what to do.
        about: what else the answers depend on, by name, as JSON values: engine, model, dtype and so on. If it has a
            "model", that must be a directory or hub repository, whose files are compared when a run goes on.
        subtitles: folder for one .srt file a video, beside the output; it is made.
        restart: begin again although there is a journal or an output, which is replaced at the end.
        progress: called with the rows that are done, and about how many there are or None.

    Raises:
        ValueError: options or inputs that cannot be used, an output that is one of them, a journal of another run, or
            pictures that were changed since it was written.
        OSError: an input that does not exist, an output that exists or appeared meanwhile, or a disk that is full.
        ImportError: what reads or writes a format is not installed.
        Interrupted: KeyboardInterrupt came; what was done is kept.
    """
    out = Path(output)
    require_format(out)  # before the inputs are searched
    if options.batch_size < 1:
        raise ValueError(f"batch_size is {options.batch_size}; expected 1 or more.")
    found = find_sources(inputs, options)
    outputs = outputs_for(out, found, subtitles)
    outputs.refuse_inputs(found.read_files())
    there = outputs.states()
    if there and not restart and not outputs.journal.exists():
        raise _exists(there)
    with BatchJournal(outputs.journal, _identity(found, options, about), restart, there) as journal:
        if there and not restart and not journal.batches:
            raise _exists(there)  # the journal was of a run that had done nothing
        resumed = journal.rows
        try:
            _answer_all(found, load, options, journal, progress)
        except KeyboardInterrupt:
            raise Interrupted(journal.rows, outputs.journal) from None
        beside = tuple(path for path in outputs.captions.values() if path != out)
        report = Report(output=out, resumed_rows=resumed, left_out=found.left_out, subtitles=beside)
        outputs.write(report.over(journal.in_order()), options.every, journal.replaces or {})
        journal.remove()
    return report


def _exists(there: Iterable[str]) -> FileExistsError:
    return FileExistsError(
        f"{next(iter(there))!r} exists already, and a finished output is not added to. For new images, name them alone "
        "and another output; the rows of both can be put together. To answer everything again, pass --restart."
    )


def _identity(found: Inputs, options: BatchOptions, about: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same for a run to be resumed."""
    values = dataclasses.asdict(options)
    identity = {**about, **values.pop("sampling"), **values, "inputs": found.identity()}
    if (model := about.get("model")) is not None:
        identity["model_files"] = checkpoint_identity(str(model))
    return identity


def _answer_all(
    found: Inputs,
    load: Callable[[], Engine],
    options: BatchOptions,
    journal: BatchJournal,
    progress: Callable[[int, int | None], None],
) -> None:
    total = found.rows()
    progress(journal.rows, total)
    batches = plan(found, options.batch_size)
    skip_done(batches, journal)
    engine: Engine | None = None
    try:
        for batch in opened_ahead(batches, options.system):
            if engine is None:
                engine = load()
            journal.append(_answer(batch, engine, options.sampling), [one.state for one in batch])
            progress(journal.rows, total)
    finally:
        if engine is not None:
            engine.close()


def _answer(batch: Sequence[Opened], engine: Engine, sampling: Sampling) -> list[dict[str, Any]]:
    """Return the row of each request of a batch, with its number as `index`, which is added to the seed."""
    asked = [(one.conversation, sampling.of_row(one.index)) for one in batch if one.conversation is not None]
    results = iter(_generate(engine, asked))
    rows = []
    for one in batch:
        result = one.error if one.conversation is None else next(results)
        answered, error = (result, None) if isinstance(result, Answer) else (None, result)
        row = {"index": one.index, **row_of(one.request, answered, error)}
        rows.append({**row, FIRST_OF_SEVERAL: True} if answered and one.is_first else row)
    return rows


def _generate(engine: Engine, asked: Sequence[tuple[Conversation, Sampling]]) -> list[Answer | str]:
    """Return the answer to each conversation, or why it is refused."""
    if not asked:
        return []
    try:
        return list(engine.generate([conversation for conversation, _ in asked], [sampling for _, sampling in asked]))
    except ValueError as error:
        if len(asked) == 1:
            return [str(error)]
    return [result for one in asked for result in _generate(engine, [one])]
