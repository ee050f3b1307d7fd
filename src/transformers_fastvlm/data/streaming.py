# SPDX-License-Identifier: Apache-2.0
"""Streamed samples, from an `IterableDataset` of Hugging Face's `datasets`."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from .image_files import ImageFolder
from .row_sources import open_dataset
from .sample_errors import ImageError, Place
from .samples import SAMPLE_KEYS, parse_row, sample_of

__all__ = ["open_stream"]

logger = logging.getLogger(__name__)


def open_stream(
    source: Any, split: str | None, name: str | None, images: ImageFolder, skip: bool, limit: int | None
) -> Any:
    """Return a `datasets.IterableDataset` of samples.

    Args:
        source, split, name: see `open_dataset`.
        images: opens the images.
        skip: skip rows whose images cannot be decoded, and count them in the log.
        limit: keep only this many rows, from the start.
    """
    if isinstance(source, str | os.PathLike) and os.path.isfile(source):
        raise ValueError(f"{os.fspath(source)!r} is always read row by row; leave streaming out.")
    stream = open_dataset(source, split, name, True, images.follow_symlinks).with_format(None)
    label = os.fspath(source) if isinstance(source, str | os.PathLike) else "the stream"
    features = stream.features
    if features is not None:
        stream = stream.decode(False)  # images come as bytes
    if limit is not None:
        stream = stream.take(limit)
    return stream.map(
        _ToSamples(label, images, skip),
        with_indices=True,
        batched=True,
        batch_size=1,
        remove_columns=None if features is None else list(features),
    )


class _ToSamples:
    """Turns a batch of one row into a batch of one sample, or into an empty batch if the row is skipped."""

    def __init__(self, source: str, images: ImageFolder, skip: bool) -> None:
        self.source, self.images, self.skip = source, images, skip
        self.num_skipped = 0

    def __call__(self, batch: Mapping[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        raw = {key: values[0] for key, values in batch.items()}
        place = Place(self.source, rows[0], None, None if raw.get("id") is None else str(raw["id"]))
        try:
            sample = sample_of(*parse_row(raw, place), place, self.images)
        except ImageError as error:
            if not self.skip:
                raise
            self.num_skipped += 1
            logger.warning("Skipped, %d so far in this process: %s", self.num_skipped, error)
            return {key: [] for key in SAMPLE_KEYS}
        return {key: [value] for key, value in sample.items()}
