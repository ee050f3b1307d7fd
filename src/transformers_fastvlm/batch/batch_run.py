# SPDX-License-Identifier: Apache-2.0
"""A run over many images, each used once: sources → planning → opening → answering → journal → outputs."""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engines.base import Answer, Sampling
from ..engines.engine import Engine
from ..engines.request import Request as EngineRequest
from ..engines.requests_in_flight import as_ended
from ..images.decoding import FIRST_OF_SEVERAL
from .answer_fields import field_types, with_fields
from .batch_journal import BatchJournal
from .batch_rows import Report, row_of
from .opening import Opened, opened_ahead
from .outputs import outputs_for, require_format
from .planning import plan, unfinished
from .requests import SourceOptions
from .resuming import Interrupted, identity_of, resumable
from .sources import Inputs, find_sources

__all__ = ["BatchOptions", "Interrupted", "run_batch"]


@dataclass(frozen=True, kw_only=True)
class BatchOptions(SourceOptions):
    """Options of a run; see also `SourceOptions`.

    Args:
        system: system message that replaces the chat template's.
        sampling: sampling options. A row's seed is `sampling.seed` plus its index.
        batch_size: number of rows that are answered at the same time; a killed run loses at most two batches.
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
    reading: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Ask a question about each image and write the answers to one file.

    The journal, named like the output plus `.journal`, stores the finished rows on disk, one batch at a time, while
    others are answered. If it exists, its run is resumed. It is removed when the output is complete. For an output that
    is a link, the journal is beside the link's target.

    Args:
        inputs: images, videos, tables, folders, which are searched with their subfolders, and patterns such as
            "photos/**/*.jpg".
        output: path that ends in .jsonl or .parquet, or, for a single video, in .srt.
        load: loads the engine; not called if nothing is left to answer.
        options: options of the run.
        about: everything else that the answers depend on, as JSON values by name: engine, model, dtype and so on. If
            it has a "model", that must be a directory or hub repository; a resumed run compares its files.
        subtitles: folder for one additional .srt file per video; it is created.
        restart: discard an existing journal, and replace an existing output at the end.
        progress: called with the number of finished rows and the approximate total, or None if that is unknown.
        reading: called with the bytes read so far and in all, while tables and the model's files are read to notice
            changes; first for the tables, then for the model.

    Raises:
        ValueError: invalid options or inputs, an output that is one of the inputs, a journal of another run, or
            images that changed since it was written.
        OSError: an input does not exist, the output exists or was created meanwhile, or the disk is full.
        ImportError: a package for a format is not installed.
        Interrupted: KeyboardInterrupt; the finished rows are kept.
    """
    out = Path(output)
    require_format(out)  # before the inputs are searched
    if options.batch_size < 1:
        raise ValueError(f"batch_size is {options.batch_size}; expected 1 or more.")
    found = find_sources(inputs, options)
    outputs = outputs_for(out, found, subtitles, field_types(options.sampling.schema))
    outputs.refuse_inputs(found.read_files())
    with resumable(outputs, _identity(found, options, about, reading), restart) as journal:
        resumed = journal.rows
        try:
            _answer_all(found, load, options, journal, progress)
        except KeyboardInterrupt:
            raise Interrupted(journal.rows, outputs.journal) from None
        beside = tuple(path for path in outputs.captions.values() if path != out)
        report = Report(output=out, resumed_rows=resumed, left_out=found.left_out, subtitles=beside)
        outputs.write(report.over(journal.in_order()), options.every, journal.replaces or {})
    return report


def _identity(
    found: Inputs, options: BatchOptions, about: dict[str, Any], reading: Callable[[int, int], None]
) -> dict[str, Any]:
    """Return the identity of a run, which must not change when it is resumed."""
    values = dataclasses.asdict(options)
    return identity_of(found, about, {**values.pop("sampling"), **values}, reading)


def _answer_all(
    found: Inputs,
    load: Callable[[], Engine],
    options: BatchOptions,
    journal: BatchJournal,
    progress: Callable[[int, int | None], None],
) -> None:
    total, size = found.rows(), options.batch_size
    progress(journal.rows, total)
    batches = unfinished(plan(found, max(1, size // 2)), journal)
    if (first := next(batches, None)) is None:
        return
    engine = load()

    def write(finished: Sequence[tuple[Opened, Answer | ValueError]]) -> None:
        rows = [_row(one, result, options.sampling) for one, result in finished]
        journal.append(rows, [one.state for one, _ in finished])
        progress(journal.rows, total)

    try:
        engine.check(options.sampling)
        finished: list[tuple[Opened, Answer | ValueError]] = []
        asked = _asked(opened_ahead(itertools.chain([first], batches), options.system), engine, options.sampling)
        with contextlib.closing(as_ended(asked, size, engine.batch_size)) as ended:
            for group in ended:
                finished += group
                while len(finished) >= size:  # each write waits for the disk
                    write(finished[:size])
                    del finished[:size]
        if finished:
            write(finished)
    finally:
        engine.close()


def _asked(
    opened: Iterable[Sequence[Opened]], engine: Engine, sampling: Sampling
) -> Iterator[tuple[Opened, Callable[[], EngineRequest]]]:
    """Yield each row, without its images, and the function that asks the engine."""
    for one in itertools.chain.from_iterable(opened):
        yield dataclasses.replace(one, conversation=None), functools.partial(_ask, one, engine, sampling)


def _ask(one: Opened, engine: Engine, sampling: Sampling) -> EngineRequest:
    """Ask an engine; the row's number is added to the seed."""
    if one.conversation is None:
        raise ValueError(one.error or "")
    return engine.stream(one.conversation, sampling.of_row(one.index))


def _row(one: Opened, result: Answer | ValueError, sampling: Sampling) -> dict[str, Any]:
    """Return the row of a request, with its number as `index`."""
    answered, error = (result, None) if isinstance(result, Answer) else (None, str(result))
    row = {"index": one.index, **row_of(one.request, answered, error)}
    if sampling.schema is not None:
        row = with_fields(row, sampling.schema)
    return {**row, FIRST_OF_SEVERAL: True} if answered and one.is_first else row
