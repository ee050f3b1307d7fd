# SPDX-License-Identifier: Apache-2.0
"""A run over many pictures: batches in a fixed order, each answered, written to the journal, and never done again."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..checkpoints.embedded import resolve_model
from ..data.fingerprints import fingerprint
from ..data.sample_errors import shortened
from ..engines.base import Answer, Conversation, Engine, Sampling
from ..images.decoding import is_machine_fault
from .batch_journal import Journal, JournalError
from .outputs import require_format, state_of, write_rows, write_subtitles
from .requests import Request, conversation_about, printable, reason_of
from .sources import Inputs, SourceOptions, find_sources

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["COLUMNS", "Batch", "BatchOptions", "Interrupted", "Report", "journal_of", "run_batch"]

COLUMNS = (
    "source",
    "row",
    "image",
    "time",
    "question",
    "answer",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "error",
)
"""What each row of the output has."""

_WINDOW = 512
_WHOLE_MODEL_FILES = 2**26
_MODEL_FILES = (".json", ".safetensors", ".txt", ".jinja", ".model", ".bin")

Batch = list[tuple[int, Request]]
Opened: TypeAlias = "tuple[list[Any], list[Image | str | None]]"


class Interrupted(Exception):
    """The user stopped the run; what was done is in the journal.

    Attributes:
        rows: how many are done.
        journal: file that they are kept in.
    """

    def __init__(self, rows: int, journal: Path) -> None:
        super().__init__(f"stopped after {rows:,} rows.")
        self.rows, self.journal = rows, journal


@dataclass(frozen=True, kw_only=True)
class BatchOptions(SourceOptions):
    """What a run is asked to do; see also `SourceOptions`.

    Args:
        system: message in place of the chat template's own.
        sampling: how answers are made. A batch's seed is `sampling.seed` plus the number of the batch.
        batch_size: rows that are answered together, and lost at most where a run is killed.
    """

    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 16


@dataclass(frozen=True)
class Report:
    """How a run ended.

    Attributes:
        output: the file that was written.
        rows: how many it has.
        resumed_rows: how many of them an earlier process had done.
        errors: rows without an answer.
        cut: answers that ended at `max_new_tokens`.
        left_out: files in folders that are neither pictures nor videos.
        examples: source and error of the first rows without an answer, 20 at most.
        subtitles: files that were written beside the output.
    """

    output: Path
    rows: int
    resumed_rows: int
    errors: int
    cut: int
    left_out: int
    examples: tuple[tuple[str, str], ...]
    subtitles: tuple[Path, ...]


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
    begins. If it is there, the run goes on where that one stopped. It is removed when the output is whole. Of an output
    that is a link, all that is about the file that it leads to.

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
    require_format(out)
    if options.batch_size < 1:
        raise ValueError(f"batch_size is {options.batch_size}; expected 1 or more.")
    found = find_sources(inputs, options)
    beside = _subtitle_files(found, out, subtitles)
    journal_path = journal_of(out)
    written = dict.fromkeys([out, *beside.values()])
    _refuse_inputs([*written, *map(_partial, written), journal_path], found)
    states = {str(path): state for path in written if (state := state_of(path)) is not None}
    if states and not journal_path.exists() and not restart:
        raise _exists(next(iter(states)))
    journal = Journal(journal_path, _identity(found, options, about), restart, states)
    try:
        if states and not journal.batches and not restart:
            raise _exists(next(iter(states)))  # the journal was of a run that had done nothing
        resumed = journal.rows
        try:
            _answer_all(found, load, options, journal, progress)
        except KeyboardInterrupt:
            raise Interrupted(journal.rows, journal_path) from None
        report = _write(out, journal, options, beside)
        journal.remove()
        return dataclasses.replace(report, resumed_rows=resumed, left_out=found.left_out)
    except BaseException:
        if not journal.batches:
            journal.remove()
        raise
    finally:
        journal.close()


def journal_of(output: Path) -> Path:
    """Return where an output's journal is: beside it, or where it is a link beside the file that it leads to."""
    real = Path(os.path.realpath(output))
    return real.with_name(real.name + ".journal")


def _partial(output: Path) -> Path:
    real = Path(os.path.realpath(output))
    return real.with_name(real.name + ".partial")


def _exists(path: str) -> FileExistsError:
    return FileExistsError(f"{path!r} exists already. Name another output, or replace it with --restart.")


def _refuse_inputs(written: Sequence[Path], found: Inputs) -> None:
    """Refuse outputs that are inputs, by whatever name or link.

    Raises:
        ValueError: one is.
    """
    there = [path for path in written if path.exists()]
    for file in found.read_files() if there else ():
        for path in there:
            if os.path.exists(file) and os.path.samefile(path, file):
                raise ValueError(f"{str(path)!r} would be written, but it is the input {file!r}. Name another output.")


def _identity(found: Inputs, options: BatchOptions, about: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same for a run to go on."""
    values = dataclasses.asdict(options)
    identity = {**about, **values.pop("sampling"), **values, "inputs": found.identity()}
    if (model := about.get("model")) is not None:
        identity["model_files"] = _model_files(str(model))
    return identity


def _model_files(model: str) -> dict[str, str]:
    """Return digests of a checkpoint's files, or the commit of one on the hub."""
    model = resolve_model(model)
    if os.path.isdir(model):
        files = sorted(path for path in Path(model).iterdir() if path.suffix in _MODEL_FILES and path.is_file())
        return {path.name: fingerprint(path, _WHOLE_MODEL_FILES) for path in files}
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    return {"commit": str(extract_commit_hash(cached_file(model, "config.json"), None))}


# Answering


def _answer_all(
    found: Inputs,
    load: Callable[[], Engine],
    options: BatchOptions,
    journal: Journal,
    progress: Callable[[int, int | None], None],
) -> None:
    total = found.rows()
    progress(journal.rows, total)
    remaining = plan(found, options.batch_size)
    _check_files(journal, islice(remaining, journal.batches))
    engine: Engine | None = None
    try:
        for batch, (states, opened) in _ahead(remaining):
            if engine is None:
                engine = load()
            journal.append(_answer(batch, opened, engine, options, journal.batches), states)
            progress(journal.rows, total)
    finally:
        if engine is not None:
            engine.close()


def _check_files(journal: Journal, done: Iterable[Batch]) -> None:
    """Check that the pictures of the batches that are done are what they were.

    Raises:
        JournalError: one is not.
    """
    for batch, before in zip(done, journal.files(), strict=False):
        for (_, request), state in zip(batch, before, strict=False):
            if _state(request) != state:
                raise JournalError(
                    f"{shortened(request.file)} was changed since it was asked about, so that old and new answers "
                    f"would mix. Put it back, or begin again with --restart; {journal.rows:,} rows are done."
                )


def _state(request: Request) -> Any:
    return None if request.file is None else state_of(request.file)


def plan(requests: Iterable[Request], batch_size: int) -> Iterator[Batch]:
    """Yield batches of numbered requests with questions of similar length, always the same ones.

    Requests are sorted within windows of 512 (or one batch, if that is more), the longest question first.
    """
    numbered = enumerate(requests)
    window_size = max(1, _WINDOW // batch_size) * batch_size
    while window := list(islice(numbered, window_size)):
        window.sort(key=lambda item: -len((item[1].question or "").encode(errors="replace")))
        for start in range(0, len(window), batch_size):
            yield window[start : start + batch_size]


def _ahead(batches: Iterable[Batch]) -> "Iterator[tuple[Batch, Opened]]":
    """Yield each batch with its pictures; those of the next are opened meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[Batch, Future[Opened]] | None = None
        for batch in batches:
            following = (batch, pool.submit(_open_all, batch))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _open_all(batch: Batch) -> "Opened":
    """Return the state of each request's file, and its picture, or why it cannot be opened."""
    states = [_state(request) for _, request in batch]
    return states, [None if request.picture is None else _opened(request.picture) for _, request in batch]


def _opened(picture: "Callable[[], Image]") -> "Image | str":
    try:
        return picture()
    except Exception as error:  # a damaged file must not end the run, whatever a decoder raises
        if is_machine_fault(error):
            raise
        return reason_of(error)


def _answer(
    batch: Batch, opened: "list[Image | str | None]", engine: Engine, options: BatchOptions, number: int
) -> list[dict[str, Any]]:
    """Return the rows of a batch."""
    errors: dict[int, str] = {}
    conversations: dict[int, Conversation] = {}
    for (index, request), picture in zip(batch, opened, strict=True):
        if request.error is not None or request.question is None:
            errors[index] = request.error or "there is no question."
        elif picture is None or isinstance(picture, str):
            errors[index] = picture or "there is no picture."
        else:
            try:
                conversations[index] = conversation_about(picture, request.question, options.system)
            except ValueError as error:
                errors[index] = str(error)
    sampling = options.sampling
    if sampling.seed is not None:
        sampling = dataclasses.replace(sampling, seed=sampling.seed + number)
    answers, refused = _generate(engine, conversations, sampling)
    errors |= refused
    return [_row(index, request, answers.get(index), errors.get(index)) for index, request in batch]


def _generate(
    engine: Engine, conversations: dict[int, Conversation], sampling: Sampling
) -> tuple[dict[int, Answer], dict[int, str]]:
    """Return the answers, and why others were refused; then the rest is asked one by one."""
    if not conversations:
        return {}, {}
    try:
        answers = engine.generate(list(conversations.values()), sampling)
        return dict(zip(conversations, answers, strict=True)), {}
    except ValueError as error:
        if len(conversations) == 1:
            return {}, {index: str(error) for index in conversations}
    found: dict[int, Answer] = {}
    refused: dict[int, str] = {}
    for index, conversation in conversations.items():
        answered, why = _generate(engine, {index: conversation}, sampling)
        found |= answered
        refused |= why
    return found, refused


def _row(index: int, request: Request, answer: Answer | None, error: str | None) -> dict[str, Any]:
    return {
        "index": index,
        "source": request.source,
        "row": request.row,
        "image": request.image,
        "time": request.time,
        "question": request.question,
        "answer": answer.text if answer else None,
        "finish_reason": answer.finish_reason if answer else None,
        "prompt_tokens": answer.prompt_tokens if answer else None,
        "completion_tokens": answer.completion_tokens if answer else None,
        "error": error,
    }


# Writing


def _subtitle_files(found: Inputs, output: Path, folder: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Return the subtitle file of each video, by its name in the rows."""
    videos = found.videos()
    if output.suffix.lower() == ".srt":
        if len(videos) != 1 or not found.only_videos() or folder is not None:
            raise ValueError(
                f"the output {str(output)!r} is subtitles, which need one video and nothing else, but there are "
                f"{len(videos)} videos. Name a .jsonl file, and a folder with --srt."
            )
        return {printable(videos[0]): output}
    if folder is None:
        return {}
    files = {printable(video): Path(folder) / f"{Path(video).stem}.srt" for video in videos}
    if not files:
        raise ValueError("--srt writes the captions of videos, but no video is among the inputs.")
    if len(set(files.values())) < len(videos):
        raise ValueError("two videos have the same name, and so would their subtitles. Take them one by one.")
    return files


def _write(output: Path, journal: Journal, options: BatchOptions, subtitles: dict[str, Path]) -> Report:
    """Write what the journal holds to the output and the subtitles."""
    counts = {"rows": 0, "errors": 0, "cut": 0}
    replaces = journal.replaces or {}
    examples: list[tuple[str, str]] = []
    captions: dict[str, list[dict[str, Any]]] = {name: [] for name in subtitles}

    def counted() -> Iterator[dict[str, Any]]:
        for row in journal.in_order():
            counts["rows"] += 1
            counts["cut"] += row["finish_reason"] == "length"
            if row["error"] is not None:
                counts["errors"] += 1
                if len(examples) < 20:
                    examples.append((_place(row), row["error"]))
            if row["source"] in captions:
                captions[row["source"]].append({"time": row["time"], "answer": row["answer"]})
            yield row

    if output.suffix.lower() == ".srt":
        for _ in counted():
            pass
    else:
        write_rows(output, counted(), replaces.get(str(output)))
    for name, path in subtitles.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_subtitles(path, captions[name], options.every, replaces.get(str(path)))
    return Report(
        output=output,
        **counts,
        resumed_rows=0,
        left_out=0,
        examples=tuple(examples),
        subtitles=tuple(path for path in subtitles.values() if path != output),
    )


def _place(row: dict[str, Any]) -> str:
    """Return how a row is named in a message."""
    if row["row"] is not None:
        return f"{row['source']}, row {row['row']}"
    return f"{row['source']}, {row['time']:.3f} s" if row["time"] is not None else str(row["source"])
