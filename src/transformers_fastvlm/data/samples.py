# SPDX-License-Identifier: Apache-2.0
"""Samples: what a training run takes, read from LLaVA's JSON or JSONL, or from data sets of Hugging Face.

A sample is `{"messages": [{"role", "content"}, …], "images": [Pillow image, …], "id": str or None, "place": str}`;
a user's content has one "<image>" for each picture, in order, and `place` names the row in errors.
"""

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..storage.digests import joined
from .folders import folder_rows, parquet_rows
from .image_files import ImageFolder
from .json_rows import JsonRows
from .messages import check_messages, messages_and_sources
from .row_fields import images_of
from .rows import HubRows, ListRows, Rows
from .sample_errors import ImageError, Place, SampleError, shortened

__all__ = ["Part", "SampleDataset", "load", "open_part", "parse_row", "sample_of", "source_name"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Rows, and where their images are."""

    rows: Rows
    images: ImageFolder


class SampleDataset(Dataset):
    """Samples by index; rows are read, and images decoded, when they are asked for.

    Made by `load`. It can be pickled, and the workers of a data loader, forked or spawned, each read for themselves.
    `a + b` puts two together, and `select` takes some.

    Attributes:
        skipped: the errors of rows that were left out because of `on_bad_image="skip"`.
        num_excluded: how many rows `exclude` left out.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        index: np.ndarray | None = None,
        skipped: Sequence[SampleError] = (),
        num_excluded: int = 0,
    ) -> None:
        self._parts = list(parts)
        self._ends = list(accumulate(len(part.rows) for part in parts))
        self._index = index
        self.skipped = list(skipped)
        self.num_excluded = num_excluded

    def __len__(self) -> int:
        return (self._ends[-1] if self._ends else 0) if self._index is None else len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample.

        Raises:
            SampleError: the row cannot be used; an ImageError where that is because of an image.
            IndexError: there is no such sample.
        """
        messages, sources, place = self.unopened(index)
        return sample_of(messages, sources, place, self._located(index)[0].images)

    def unopened(self, index: int) -> tuple[list[dict[str, str]], list[Any], Place]:
        """Return the messages of a sample, what its row says of its images, and its place.

        Raises:
            SampleError: the words of the row cannot be used, or do not match its images.
        """
        raw, place = self.row(index)
        return (*parse_row(raw, place), place)

    def row(self, index: int) -> tuple[Mapping[str, Any], Place]:
        """Return a row as it stands in its source, and its place.

        Raises:
            SampleError: it cannot be read.
        """
        part, row = self._located(index)
        raw = part.rows[row]
        return raw, part.rows.place(row, _id_of(raw))

    def messages(self, index: int) -> list[dict[str, str]]:
        """Return the messages of a sample without reading anything of its images.

        Raises:
            SampleError: they are not messages.
        """
        part, row = self._located(index)
        raw = part.rows.text_of(row)
        try:
            return messages_and_sources(raw)[0]
        except ValueError as error:
            raise SampleError(str(error), part.rows.place(row, _id_of(raw))) from error

    def digest(self) -> str:
        """Return what is another one where the samples are others: other rows, or in another order.

        The content of images does not count. All files of rows are read.
        """
        chosen = "" if self._index is None else hashlib.sha256(self._index.tobytes()).hexdigest()
        return joined([*(part.rows.digest() for part in self._parts), chosen])

    def image_folder(self, index: int) -> ImageFolder:
        """Return what opens the images of a sample."""
        return self._located(index)[0].images

    def place(self, index: int) -> Place:
        """Return where a sample stands, without reading it."""
        part, row = self._located(index)
        return part.rows.place(row)

    def select(self, indices: Iterable[int]) -> "SampleDataset":
        """Return the data set of these samples, in this order; the same one may come more than once."""
        chosen = np.fromiter(indices, np.int64)
        if len(chosen) and not (0 <= chosen.min() and chosen.max() < len(self)):
            raise IndexError(f"indices from {chosen.min()} to {chosen.max()} were selected of {len(self)} samples.")
        index = chosen if self._index is None else self._index[chosen]
        return SampleDataset(self._parts, index, self.skipped, self.num_excluded)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, SampleDataset):
            return super().__add__(other)
        index = None
        if self._index is not None or other._index is not None:
            ours, theirs = (
                np.arange(len(one), dtype=np.int64) if one._index is None else one._index for one in (self, other)
            )
            index = np.concatenate([ours, theirs + (self._ends[-1] if self._ends else 0)])
        return SampleDataset(
            self._parts + other._parts,
            index,
            self.skipped + other.skipped,
            self.num_excluded + other.num_excluded,
        )

    def to_datasets(self) -> Any:
        """Return the same samples as a `datasets.Dataset`, for trainers that take nothing else, such as TRL's.

        It holds no more than indices; samples are made when they are asked for, as here.

        Raises:
            ImportError: the package `datasets` is missing.
        """
        from .streaming import as_datasets

        return as_datasets(self)

    def _located(self, index: int) -> tuple[Part, int]:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"sample {index} was asked for, but there are {length}.")
        index = index % length
        position = index if self._index is None else int(self._index[index])
        number = bisect_right(self._ends, position)
        return self._parts[number], position - (self._ends[number - 1] if number else 0)


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
        from .streaming import open_stream

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


def parse_row(raw: Mapping[str, Any], place: Place) -> tuple[list[dict[str, str]], list[Any]]:
    """Return the messages of a row in the one form, and what it says of its images.

    Raises:
        SampleError: it cannot be used.
    """
    try:
        messages, inside = messages_and_sources(raw)
        sources = images_of(raw, inside)
        check_messages(messages, len(sources))
    except ValueError as error:
        raise SampleError(str(error), place) from error
    return messages, sources


def sample_of(messages: list[dict[str, str]], sources: list[Any], place: Place, images: ImageFolder) -> dict[str, Any]:
    """Return a sample with its images opened."""
    try:
        opened = [images.open(source) for source in sources]
    except SampleError as error:
        raise type(error)(error.reason, place) from error
    return {"messages": messages, "images": opened, "id": place.id, "place": str(place)}


def _id_of(raw: Mapping[str, Any]) -> str | None:
    found = raw.get("id")
    return None if found is None else found if isinstance(found, str) else shortened(found)


def _is_list_of_sources(source: Any) -> bool:
    if not isinstance(source, list | tuple) or not source:
        return False
    return not any(isinstance(one, Mapping) and "source" not in one for one in source)


def open_part(
    source: Any,
    image_folder: Any,
    split: str | None,
    name: str | None,
    follow_symlinks: bool,
    do_exif_transpose: bool = True,
) -> Part:
    """Return the rows of one source and where their images are; see `load`. Rows may be damaged."""
    rows: Rows
    if isinstance(source, list | tuple):
        rows = ListRows(source)
    elif isinstance(source, str | os.PathLike) and os.path.isfile(source):
        path = os.fspath(source)
        rows = parquet_rows([path], path) if path.lower().endswith((".parquet", ".arrow")) else JsonRows(path)
        image_folder = Path(source).absolute().parent if image_folder is None else image_folder
    elif isinstance(source, str | os.PathLike) and os.path.isdir(source):
        rows = folder_rows(os.fspath(source), split, name, follow_symlinks)
        image_folder = source if image_folder is None else image_folder
    else:
        from .streaming import open_dataset

        dataset = open_dataset(source, split, name, False, follow_symlinks)
        rows = HubRows(dataset, source_name(source))
    return Part(rows, ImageFolder(image_folder, follow_symlinks, do_exif_transpose))


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
    from .check import inspect_rows

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


def source_name(source: Any) -> str:
    """Return how a source is called in messages."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return "the list of rows" if isinstance(source, list | tuple) else f"the {type(source).__name__}"
