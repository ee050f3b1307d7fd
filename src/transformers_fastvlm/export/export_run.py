# SPDX-License-Identifier: Apache-2.0
"""`export`: check the options, write into a temporary directory, add the card, rename the directory."""

import importlib
import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..storage.atomic_files import new_directory
from .cards import model_card
from .export_source import Source
from .targets import TARGETS, ExportOptions, Report, Target, Writer

__all__ = ["Export", "export"]

SIZE_STEP, LARGEST_SIZE = 64, 2048


@dataclass(frozen=True)
class Export:
    """The result of `export`.

    Attributes:
        directory: of the files.
        target: the target's name.
        precisions: the written precisions.
        report: the measured errors and limits of the files.
        files: every file, relative to the directory, with its size in bytes.
    """

    directory: Path
    target: str
    precisions: tuple[str, ...]
    report: Report
    files: dict[str, int]

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(self.files.values())


def export(
    target: str,
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: str | Sequence[str] | None = None,
    sizes: Sequence[int] = (),
    external_data: bool | None = None,
    name: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int, str], None] = lambda done, total, doing: None,
) -> Export:
    """Write a model in the format of another runtime.

    The files are checked in that runtime if it runs on this machine. The checkpoint is never changed, and `out` appears
    only when it is complete.

    Args:
        target: a name in `TARGETS`.
        model: directory of a checkpoint, or "tiny".
        out: a directory that does not exist yet, or is empty.
        precision: one of the target's precisions, or several if the target supports that; by default its first.
        sizes: heights, equal to widths, of the images in pixels, for targets that fix them.
        external_data: for "onnx": store weights in separate files beside the graphs; by default only if a graph
            would otherwise exceed 1.5 GB.
        name: of the model in the card, such as its name on the hub; by default the directory's name.
        say: called with a line before each step.
        progress: called with the number of finished steps, the largest number of steps, and the line of the next one.

    Raises:
        FileExistsError: `out` exists and is not an empty directory.
        FileNotFoundError: the checkpoint, or a part of it, is missing.
        ImportError: the target needs packages that are not installed.
        ValueError: the target, precision or size is unknown, or the target does not support the model.

    Example:
        >>> export("onnx", "tiny", "tiny-onnx", precision="q4f16")  # doctest: +SKIP
    """
    row, precisions = _check(target, precision, sizes)
    if external_data is not None and target != "onnx":
        raise ValueError(f"external_data is for the target 'onnx'; {target!r} has no such option.")
    source, out = Source(model, name), Path(out)
    if out.resolve().is_relative_to(source.directory.resolve()):
        raise ValueError(
            f"{out} is inside the checkpoint {source.directory}, which is never changed. Choose another directory."
        )
    write = _writer(target, row)
    finished = itertools.count()

    def step(line: str) -> None:
        say(line)
        progress(next(finished), total, line)

    options = ExportOptions(precisions=precisions, sizes=tuple(sizes), external_data=external_data, say=step)
    total = row.steps(options)
    with new_directory(out) as directory:
        report = write(source, directory, options)
        for path in source.licence_files():
            shutil.copyfile(path, directory / path.name)
        card = model_card(source, target, row, precisions, report)
        (directory / "README.md").write_text(card, encoding="utf-8")
        files = {
            path.relative_to(directory).as_posix(): path.stat().st_size
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
    return Export(out, target, precisions, report, files)


def _check(target: str, precision: str | Sequence[str] | None, sizes: Sequence[int]) -> tuple[Target, tuple[str, ...]]:
    """Return the target's row and the precisions, or raise ValueError that lists what is valid."""
    row = TARGETS.get(target)
    if row is None:
        raise ValueError(f"target is {target!r}; expected one of {', '.join(TARGETS)}.")
    chosen = row.precisions[:1] if precision is None else (precision,) if isinstance(precision, str) else precision
    chosen = tuple(dict.fromkeys(chosen))
    if not row.precisions and chosen:
        raise ValueError(f"precision is {', '.join(chosen)}, but {target!r} keeps the checkpoint's. Leave it out.")
    valid = ", ".join(row.precisions)
    for each in chosen:
        if each not in row.precisions:
            raise ValueError(f"precision is {each!r}; for the target {target!r} expected one of {valid}.")
    if row.precisions and (not chosen or (len(chosen) > 1 and not row.several_precisions)):
        raise ValueError(f"{len(chosen)} precisions were given; {target!r} takes one of {valid}.")
    for size in sizes:
        if size % SIZE_STEP or not SIZE_STEP <= size <= LARGEST_SIZE:
            raise ValueError(f"size is {size}; expected a multiple of {SIZE_STEP} from {SIZE_STEP} to {LARGEST_SIZE}.")
    if sizes and row.sizes == "none":
        raise ValueError(f"sizes are given, but the files of {target!r} take images of every size. Leave them out.")
    if len(sizes) > 1 and row.sizes == "one":
        raise ValueError(f"{len(sizes)} sizes were given; {target!r} takes one.")
    if len(set(sizes)) != len(sizes):
        raise ValueError(f"sizes are {list(sizes)}; expected each size once.")
    return row, chosen


def _writer(target: str, row: Target) -> Writer:
    """Check that the target's packages are installed, and import its module."""
    missing = [package for package in row.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f'The target {target!r} needs {", ".join(missing)}: pip install "transformers-fastvlm[{row.extra}]"'
        )
    write: Writer = getattr(importlib.import_module(f".{row.module}", __package__), row.function)
    return write
