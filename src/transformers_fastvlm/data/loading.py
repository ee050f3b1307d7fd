# SPDX-License-Identifier: Apache-2.0
"""`load`: from a source to samples, with what is to be left out, put together or repeated.

A row goes one way: source (`row_sources`), rows, messages, images (`samples`), tokens and batch (`collator`).
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
    num_workers: int = 0,
) -> Any:
    """Return the samples of a data set.

    Rows have LLaVA's `conversations` and `image` (a path, a list of them, or none), or `messages` and `images`.

    Args:
        source: a .json, .jsonl or .parquet file; a folder with such files, or what `save_to_disk` wrote (see
            `folders.folder_rows`); a `datasets.Dataset` or `IterableDataset`, or its name on the hub; a list of rows;
            or a list of sources, which are put together: each of them one of the above (but not rows), or a
            dictionary of `source` and of arguments of this function.
        image_folder: where paths in rows begin, and which they never leave. For a file its own folder by default, for
            a folder that.
        split, name: of a data set on the hub (a folder has splits too); "train" and its only configuration by default.
        on_bad_image: "error" raises when a row with an image that is missing or cannot be decoded is read. "skip"
            decodes every image once now, leaves such rows out for good, and lists them in `skipped`; nothing takes
            their place. All other errors, and images that become unreadable later, raise in any case.
        streaming: read a data set of the hub as it comes, and return a `datasets.IterableDataset` of samples.
        exclude: rows to leave out, by their index in `source`: a list, or the report that `fastvlm data check --json`
            wrote.
        limit: only this many rows, the first ones, after what is excluded.
        repeat: each row this many times.
        follow_symlinks: allow links in the image folder, or in a data set folder, that lead out of it.
        do_exif_transpose: turn images as their EXIF orientation says; False for their pixels as they are stored.
        num_workers: processes that decode images for "skip".

    Returns:
        A `SampleDataset`, or with `streaming` a `datasets.IterableDataset`.

    Raises:
        SampleError: the file is cut off or not JSON.
        ValueError: an argument that cannot be used, or a set without rows.
        ImportError: a data set of the hub, but no package `datasets`.
        OSError: a file or folder that is not there.

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
                "exclude, limit and repeat belong to one source: write them beside it, as {'source': …, 'limit': …}. "
                "Several sources cannot be streamed; combine them with datasets.interleave_datasets first."
            )
        shared = {
            "image_folder": image_folder,
            "split": split,
            "name": name,
            "on_bad_image": on_bad_image,
            "follow_symlinks": follow_symlinks,
            "do_exif_transpose": do_exif_transpose,
            "num_workers": num_workers,
        }
        entries = [one if isinstance(one, Mapping) else {"source": one} for one in source]
        loaded = [load(**{**shared, **entry}) for entry in entries]
        return sum(loaded[1:], start=loaded[0])
    if streaming:
        if exclude is not None or repeat != 1:
            raise ValueError("exclude and repeat need all rows at once; leave them or streaming out.")
        images = ImageFolder(image_folder, follow_symlinks, do_exif_transpose)
        return open_stream(source, split, name, images, on_bad_image == "skip", limit)

    part = open_part(source, image_folder, split, name, follow_symlinks, do_exif_transpose)
    if part.rows.damage is not None:
        raise part.rows.damage
    dataset = SampleDataset([part])
    if not len(dataset):
        raise ValueError(f"{source_name(source)} has no rows; expected at least one.")
    if exclude is not None:
        left_out = _excluded(exclude, len(dataset))
        dataset = dataset.select(np.setdiff1d(np.arange(len(dataset)), left_out))
        dataset.num_excluded = len(left_out)
        logger.warning("%s: %d rows are excluded, %d are left.", source_name(source), len(left_out), len(dataset))
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if on_bad_image == "skip":
        dataset = _without_bad_images(dataset, source_name(source), num_workers)
    if not len(dataset):
        raise ValueError(f"{source_name(source)} has no rows left; all of them are excluded or have unreadable images.")
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
                f"{os.fspath(exclude)!r} reports on {report['rows']} rows, but there are {num_rows}: the data changed "
                "since, or its file is damaged. Check it again."
            )
        exclude = [problem["row"] for problem in report["problems"]]
    rows = np.unique(np.fromiter(exclude, np.int64))
    if len(rows) and not (0 <= rows[0] and rows[-1] < num_rows):
        raise ValueError(f"exclude has row {rows[0] if rows[0] < 0 else rows[-1]}, but rows are 0 to {num_rows - 1}.")
    return rows


def _without_bad_images(dataset: SampleDataset, name: str, num_workers: int) -> SampleDataset:
    """Return the samples whose images can all be decoded."""
    good: list[int] = []
    bad: list[SampleError] = []
    for index, found in enumerate(inspect_rows(dataset, num_workers=num_workers)):
        if isinstance(found.error, ImageError):
            logger.warning("Skipped: %s", found.error)
            bad.append(found.error)
        else:
            good.append(index)  # any other error raises when the row is read
    logger.warning("%s: %d of %d rows are skipped for their images.", name, len(bad), len(dataset))
    kept = dataset.select(good)
    kept.skipped = [*dataset.skipped, *bad]
    return kept
