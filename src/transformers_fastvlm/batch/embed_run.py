# SPDX-License-Identifier: Apache-2.0
"""A run that makes vectors: sources → planning → opening → embedding → journal → outputs."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..embedding import Embedder
from ..engines.base import Conversation
from ..images.decoding import FIRST_OF_SEVERAL
from .batch_journal import BatchJournal
from .batch_rows import Report
from .opening import Opened, opened_ahead
from .planning import plan, unfinished
from .requests import SourceOptions
from .resuming import Interrupted, identity_of, resumable
from .sources import Inputs, find_sources
from .vector_outputs import VectorOutputs, packed, vector_row

__all__ = ["EmbedOptions", "run_embed"]


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(SourceOptions):
    """Options of a run that makes vectors; see also `SourceOptions`.

    Args:
        system: system message that replaces the chat template's.
        batch_size: number of rows that are embedded together; a killed run loses at most one batch.
    """

    prompt: str = ""
    text_files: bool = True
    system: str | None = None
    batch_size: int = 16


def run_embed(
    inputs: Sequence[str],
    output: str | os.PathLike[str],
    load: Callable[[], Embedder],
    options: EmbedOptions,
    *,
    about: dict[str, Any],
    restart: bool = False,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
    reading: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write the vectors of images and texts to one file.

    Resuming works as for `run_batch`. A row without a vector has an error; in an array its values are NaN.

    Args:
        inputs: files, folders, patterns and tables, as for `run_batch`; and .txt files with a text on each line.
        output: path that ends in .parquet or .npy. With .npy, the other columns are written to a file beside it that
            ends in .ids.jsonl, one line for each row of the array.
        load: loads the embedder; not called if nothing is left to embed.
        options: options of the run. With an empty prompt, images are embedded without a text.
        about: everything else that the vectors depend on, see `run_batch`.
        restart: discard an existing journal, and replace existing outputs at the end.
        progress: called with the number of finished rows and the approximate total, or None if that is unknown.
        reading: called with the bytes read so far and in all, see `run_batch`.

    Raises:
        ValueError, OSError, ImportError, Interrupted: see `run_batch`.
    """
    outputs = VectorOutputs(Path(output))  # before the inputs are searched
    if options.batch_size < 1:
        raise ValueError(f"batch_size is {options.batch_size}; expected 1 or more.")
    found = find_sources(inputs, options)
    outputs.refuse_inputs(found.read_files())
    with resumable(outputs, identity_of(found, about, dataclasses.asdict(options), reading), restart) as journal:
        resumed = journal.rows
        try:
            _embed_all(found, load, options, journal, progress)
        except KeyboardInterrupt:
            raise Interrupted(journal.rows, outputs.journal) from None
        report = Report(output=outputs.rows, resumed_rows=resumed, left_out=found.left_out, subtitles=())
        for _ in report.over(journal.in_order()):
            pass
        outputs.write_vectors(lambda: _without_marks(journal), report.rows, journal.replaces or {})
    return report


def _without_marks(journal: BatchJournal) -> Any:
    return ({key: value for key, value in row.items() if key != FIRST_OF_SEVERAL} for row in journal.in_order())


def _embed_all(
    found: Inputs,
    load: Callable[[], Embedder],
    options: EmbedOptions,
    journal: BatchJournal,
    progress: Callable[[int, int | None], None],
) -> None:
    total = found.rows()
    progress(journal.rows, total)
    batches = unfinished(plan(found, options.batch_size), journal)
    embedder: Embedder | None = None
    for batch in opened_ahead(batches, options.system):
        if embedder is None:
            embedder = load()
        journal.append(_embed(batch, embedder), [one.state for one in batch])
        progress(journal.rows, total)


def _embed(batch: Sequence[Opened], embedder: Embedder) -> list[dict[str, Any]]:
    """Return the row of each request of a batch, with its number as `index`."""
    results = iter(_vectors(embedder, [one.conversation for one in batch if one.conversation is not None]))
    rows = []
    for one in batch:
        vector, error = (None, one.error) if one.conversation is None else next(results)
        row = {"index": one.index, **vector_row(one.request, vector, error)}
        rows.append({**row, FIRST_OF_SEVERAL: True} if vector is not None and one.is_first else row)
    return rows


def _vectors(embedder: Embedder, conversations: Sequence[Conversation]) -> list[tuple[str | None, str | None]]:
    """Return the packed vector of each conversation, or the error."""
    try:
        vectors = embedder.embed(conversations, batch_size=max(1, len(conversations)))
        return [(packed(vector), None) for vector in vectors]
    except ValueError as error:
        if len(conversations) == 1:
            return [(None, str(error).removeprefix("Input 0: "))]
    return [result for one in conversations for result in _vectors(embedder, [one])]
