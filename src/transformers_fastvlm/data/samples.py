# SPDX-License-Identifier: Apache-2.0
"""Samples: the input of a training run, made from rows on access.

A sample is `{"messages": [{"role", "content"}, …], "images": [Pillow image, …], "id": str or None, "place": str}`;
a user's content has one "<image>" for each image, in order, and `place` names the row in errors.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..storage.digests import counted_bytes, joined
from .folders import package
from .image_files import ImageFolder
from .messages import check_messages, messages_and_sources
from .row_fields import images_of
from .row_sources import Part
from .rows import JoinedRows
from .sample_errors import Place, SampleError, shortened

__all__ = ["SAMPLE_KEYS", "SampleDataset", "parse_row", "sample_of"]

SAMPLE_KEYS = ("messages", "images", "id", "place")


class SampleDataset(Dataset):
    """Samples by index; rows are read, and images decoded, on access.

    `load` returns it. It can be pickled, and each worker of a data loader, forked or spawned, reads independently.
    `a + b` concatenates two data sets, and `select` takes a subset.

    Attributes:
        skipped: the errors of rows that `on_bad_image="skip"` left out.
        num_excluded: number of rows that `exclude` left out.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        index: np.ndarray | None = None,
        skipped: Sequence[SampleError] = (),
        num_excluded: int = 0,
    ) -> None:
        self._parts = list(parts)
        self._rows = JoinedRows([part.rows for part in parts])
        self._index: range | np.ndarray = range(len(self._rows)) if index is None else index
        self.skipped = list(skipped)
        self.num_excluded = num_excluded

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample.

        Raises:
            SampleError: the row cannot be used; an ImageError if an image is the reason.
            IndexError: the index is out of range.
        """
        raw, place = self.row(index)
        return sample_of(*parse_row(raw, place), place, self.image_folder(index))

    def row(self, index: int) -> tuple[Mapping[str, Any], Place]:
        """Return a row of the source, unchanged, and its place.

        Raises:
            SampleError: the row cannot be read.
        """
        row = self._row(index)
        raw = self._rows[row]
        return raw, self._rows.place(row, _id_of(raw))

    def messages(self, index: int) -> list[dict[str, str]]:
        """Return the messages of a sample without reading its images.

        Raises:
            SampleError: the messages are invalid.
        """
        row = self._row(index)
        raw = self._rows.text_of(row)
        try:
            return messages_and_sources(raw)[0]
        except ValueError as error:
            raise SampleError(str(error), self._rows.place(row, _id_of(raw))) from error

    def digest(self, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
        """Return a digest of the rows and their order.

        The content of image files is not included. All files with rows are read.

        Args:
            progress: called with the bytes read so far and of all files.
        """
        chosen = "" if isinstance(self._index, range) else hashlib.sha256(self._index.tobytes()).hexdigest()
        return joined([self._rows.digest(counted_bytes(progress, self._rows.files())), chosen])

    def image_folder(self, index: int) -> ImageFolder:
        """Return the `ImageFolder` that opens the images of a sample."""
        return self._parts[self._rows.locate(self._row(index))[0]].images

    def place(self, index: int) -> Place:
        """Return the place of a sample, without reading it."""
        return self._rows.place(self._row(index))

    def select(self, indices: Iterable[int]) -> "SampleDataset":
        """Return the data set of the samples at these indices, in this order; an index may repeat."""
        chosen = np.fromiter(indices, np.int64)
        if len(chosen) and not (0 <= chosen.min() and chosen.max() < len(self)):
            raise IndexError(f"indices {chosen.min()} to {chosen.max()} were selected from {len(self)} samples.")
        index = chosen if isinstance(self._index, range) else self._index[chosen]
        return SampleDataset(self._parts, index, self.skipped, self.num_excluded)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, SampleDataset):
            return super().__add__(other)
        index = None
        if not (isinstance(self._index, range) and isinstance(other._index, range)):
            index = np.concatenate([self._index, np.asarray(other._index) + len(self._rows)])
        return SampleDataset(
            self._parts + other._parts, index, self.skipped + other.skipped, self.num_excluded + other.num_excluded
        )

    def to_datasets(self) -> Any:
        """Return the same samples as a `datasets.Dataset`, for trainers that accept nothing else, such as TRL's.

        It holds only indices; samples are made on access, as here.

        Raises:
            ImportError: the package `datasets` is missing.
        """
        datasets = package("to_datasets returns a datasets.Dataset")
        return datasets.Dataset.from_dict({"index": range(len(self))}).with_transform(_ByIndex(self))

    def _row(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} is out of range; the data set has {len(self)} samples.")
        return int(self._index[index])


class _ByIndex:
    """Turns a batch of indices into a batch of samples."""

    def __init__(self, samples: SampleDataset) -> None:
        self.samples = samples

    def __call__(self, batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        rows = [self.samples[index] for index in batch["index"]]
        return {key: [row[key] for row in rows] for key in SAMPLE_KEYS}


def parse_row(raw: Mapping[str, Any], place: Place) -> tuple[list[dict[str, str]], list[Any]]:
    """Return the messages of a row in the canonical form, and its images or their names.

    Raises:
        SampleError: the row cannot be used.
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
