# SPDX-License-Identifier: Apache-2.0
"""`load`: from a source to samples; rows can be excluded, concatenated or repeated.

Stages of a row: source (`row_sources`), rows, messages, images (`samples`), tokens and batch (`collator`).
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..images.read_options import Colour, ReadOptions
from .image_files import ImageFolder
from .inspection import inspect_rows
from .row_sources import open_part, source_name
from .sample_errors import ImageError, SampleError
from .samples import SampleDataset
from .streaming import open_stream

__all__ = ["load"]

logger = logging.getLogger(__name__)


def load(
    source: Any,
    image_folder: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    name: str | None = None,
    on_bad_image: str = "error",
    streaming: bool = False,
    exclude: str | os.PathLike[str] | Iterable[int] | None = None,
    limit: int | None = None,
    repeat: int = 1,
    follow_symlinks: bool = False,
    do_exif_transpose: bool = True,
    alpha_background: Colour = "white",
    max_pixels: int | None = None,
    num_workers: int = 0,
) -> Any:
    """Return the samples of a data set.

    Rows have LLaVA's `conversations` and `image` (a path, a list of them, or none), or `messages` and `images`.

    Args:
        source: a .json, .jsonl or .parquet file; a folder with such files, or the output of `save_to_disk` (see
            `folders.folder_rows`); a `datasets.Dataset` or `IterableDataset`, or its name on the hub; a list of rows;
            or a list of sources, which are concatenated: each is one of the above (but not rows), or a dictionary with
            `source` and arguments of this function.
        image_folder: folder that image paths are relative to and must not leave. By default the folder of the file, or
            the folder that is the source.
        split, name: split and configuration of a data set on the hub (a folder has splits too); by default "train" and
            the only configuration.
        on_bad_image: "error" raises when a row with a missing or undecodable image is read. "skip" decodes every image
            once now, leaves such rows out, and lists them in `skipped`; they are not replaced. All other errors, and
            images that become unreadable later, always raise.
        streaming: read a data set of the hub while it downloads, and return a `datasets.IterableDataset` of samples.
        exclude: rows to leave out, by their index in `source`: a list, or the report of `fastvlm data check --json`.
        limit: keep only this many rows, from the start, after `exclude`.
        repeat: number of times that each row appears.
        follow_symlinks: allow links in the image folder, or in a data set folder, that lead out of it.
        do_exif_transpose, alpha_background, max_pixels: how images are read, see `images.read_options.ReadOptions`.
        num_workers: number of worker processes that decode images for "skip".

    Returns:
        A `SampleDataset`, or with `streaming` a `datasets.IterableDataset`.

    Raises:
        SampleError: the file is truncated or not JSON.
        ValueError: an argument is invalid, or the data set has no rows.
        ImportError: the source needs the package `datasets`, which is not installed.
        OSError: a file or folder does not exist.

    Example:
        >>> dataset = load("llava_instruct.json", "coco/train2017")  # doctest: +SKIP
        >>> dataset[0]["images"]  # doctest: +SKIP
        [<PIL.JpegImagePlugin.JpegImageFile image mode=RGB size=640x480>]
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image is {on_bad_image!r}; expected 'error' or 'skip'.")
    if repeat < 1 or (limit is not None and limit < 1):
        raise ValueError(f"limit is {limit} and repeat {repeat}; expected at least 1.")
    if _is_list_of_sources(source):
        if streaming or exclude is not None or limit is not None or repeat != 1:
            raise ValueError(
                "exclude, limit and repeat apply to a single source: write them next to it, as {'source': …, "
                "'limit': …}. Several sources cannot be streamed; combine them with datasets.interleave_datasets first."
            )
        shared = {
            "image_folder": image_folder,
            "split": split,
            "name": name,
            "on_bad_image": on_bad_image,
            "follow_symlinks": follow_symlinks,
            "do_exif_transpose": do_exif_transpose,
            "alpha_background": alpha_background,
            "max_pixels": max_pixels,
            "num_workers": num_workers,
        }
        entries = [one if isinstance(one, Mapping) else {"source": one} for one in source]
        loaded = [load(**{**shared, **entry}) for entry in entries]
        return sum(loaded[1:], start=loaded[0])
    reading = ReadOptions(do_exif_transpose=do_exif_transpose, alpha_background=alpha_background, max_pixels=max_pixels)
    if streaming:
        if exclude is not None or repeat != 1:
            raise ValueError("exclude and repeat need all rows at once; leave out either them or streaming.")
        images = ImageFolder(image_folder, follow_symlinks, reading)
        return open_stream(source, split, name, images, on_bad_image == "skip", limit)

    part = open_part(source, image_folder, split, name, follow_symlinks, reading)
    if part.rows.damage is not None:
        raise part.rows.damage
    dataset = SampleDataset([part])
    if not len(dataset):
        raise ValueError(f"{source_name(source)} has no rows; expected at least one.")
    if exclude is not None:
        left_out = _excluded(exclude, len(dataset))
        dataset = dataset.select(np.setdiff1d(np.arange(len(dataset)), left_out))
        dataset.num_excluded = len(left_out)
        logger.warning("%s: %d rows are excluded, %d remain.", source_name(source), len(left_out), len(dataset))
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if on_bad_image == "skip":
        dataset = _without_bad_images(dataset, source_name(source), num_workers)
    if not len(dataset):
        raise ValueError(f"{source_name(source)} has no rows left; all are excluded or have unreadable images.")
    return dataset.select(np.tile(np.arange(len(dataset)), repeat)) if repeat > 1 else dataset


def _is_list_of_sources(source: Any) -> bool:
    if not isinstance(source, list | tuple) or not source:
        return False
    return not any(isinstance(one, Mapping) and "source" not in one for one in source)


def _excluded(exclude: Any, num_rows: int) -> np.ndarray:
    """Return the rows to leave out."""
    if isinstance(exclude, str | os.PathLike):
        report = json.loads(Path(exclude).read_text(encoding="utf-8"))
        if not isinstance(report, dict) or not {"rows", "problems"} <= report.keys():
            raise ValueError(f"{os.fspath(exclude)!r} is not a report of `fastvlm data check --json`.")
        if report["rows"] != num_rows or any(problem["kind"] == "file" for problem in report["problems"]):
            raise ValueError(
                f"{os.fspath(exclude)!r} reports on {report['rows']} rows, but the data has {num_rows}: it changed, "
                "or its file is damaged. Run the check again."
            )
        exclude = [problem["row"] for problem in report["problems"]]
    rows = np.unique(np.fromiter(exclude, np.int64))
    if len(rows) and not (0 <= rows[0] and rows[-1] < num_rows):
        raise ValueError(f"exclude has row {rows[0] if rows[0] < 0 else rows[-1]}; expected rows 0 to {num_rows - 1}.")
    return rows


def _without_bad_images(dataset: SampleDataset, name: str, num_workers: int) -> SampleDataset:
    """Return the samples without undecodable images."""
    good: list[int] = []
    bad: list[SampleError] = []
    for index, found in enumerate(inspect_rows(dataset, num_workers=num_workers)):
        if isinstance(found.error, ImageError):
            logger.warning("Skipped: %s", found.error)
            bad.append(found.error)
        else:
            good.append(index)  # any other error raises when the row is read
    logger.warning("%s: %d of %d rows are skipped because of their images.", name, len(bad), len(dataset))
    kept = dataset.select(good)
    kept.skipped = [*dataset.skipped, *bad]
    return kept
