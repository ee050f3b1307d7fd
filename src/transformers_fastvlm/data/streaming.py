# SPDX-License-Identifier: Apache-2.0
"""Data sets of Hugging Face's `datasets`: opening them, and samples as they stream in."""

import copy
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from .folders import arrow_datasets, package
from .image_files import ImageFolder
from .sample_errors import ImageError, Place, shortened

__all__ = ["SAMPLE_KEYS", "as_datasets", "open_dataset", "open_stream"]

logger = logging.getLogger(__name__)

SAMPLE_KEYS = ("messages", "images", "id", "place")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def open_dataset(source: Any, split: str | None, name: str | None, streaming: bool, follow_symlinks: bool) -> Any:
    """Return a `datasets.Dataset`, or with `streaming` an `IterableDataset`.

    Args:
        source: such an object, or a name on the hub; with `streaming` also a folder, see `folders.folder_rows`.
        split: "train" by default.
        name: of the configuration.
        streaming: which of the two.
        follow_symlinks: see `folders.folder_rows`.

    Raises:
        ValueError: something else, or several splits of which none was chosen.
        ImportError: the package `datasets` is missing.
    """
    if isinstance(source, str | os.PathLike) and not os.path.isdir(source):
        _check_hub_name(os.fspath(source))
    datasets = package(f"{shortened(source)} is neither a .json or .jsonl file nor a list of rows")
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if os.path.isdir(path):
            parts = arrow_datasets(path, split, name, follow_symlinks)
            return datasets.concatenate_datasets(parts).to_iterable_dataset(num_shards=len(parts))
        source = datasets.load_dataset(path, name, split=split or "train", streaming=streaming)
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        wanted = split or "train"
        if wanted not in source:
            raise ValueError(f"the data set has no split {wanted!r}; it has {', '.join(map(repr, source))}.")
        source = source[wanted]
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    if isinstance(source, datasets.IterableDataset) and not streaming:
        raise ValueError("an IterableDataset can only be streamed; pass streaming=True.")
    if not isinstance(source, kind):
        expected = "a data set to stream" if streaming else "a .json or .jsonl file, a list of rows, or a data set"
        raise ValueError(
            f"the source is {shortened(str(source))} ({type(source).__name__}); expected {expected} of Hugging Face."
        )
    return source


def _check_hub_name(path: str) -> None:
    """Refuse what names a file or an address, and not a data set on the hub.

    Raises:
        FileNotFoundError: a path of nothing that is there.
        ValueError: an address, nothing, or something that is there and is no regular file.
    """
    if not path:
        raise ValueError("the source is ''; expected a .json or .jsonl file, a folder, or a data set on the hub.")
    if "://" in path or "::" in path:
        raise ValueError(f"the source {shortened(path)} is an address; nothing is fetched. Download the file first.")
    if os.path.lexists(path):
        raise ValueError(f"the source {shortened(path)} is there, but is no regular file; expected a file or a folder.")
    if path.endswith((".json", ".jsonl", ".parquet", ".arrow")) or not _HUB_NAME.fullmatch(path):
        raise FileNotFoundError(f"there is no file {shortened(path)}.")


def open_stream(
    source: Any, split: str | None, name: str | None, images: ImageFolder, skip: bool, limit: int | None
) -> Any:
    """Return a `datasets.IterableDataset` of samples.

    Args:
        source, split, name: see `open_dataset`.
        images: opens the images.
        skip: pass over rows whose images cannot be decoded, and count them in the log.
        limit: only this many rows.
    """
    if isinstance(source, str | os.PathLike) and os.path.isfile(source):
        raise ValueError(f"{os.fspath(source)!r} is read row by row in any case; leave streaming out.")
    stream = open_dataset(source, split, name, True, images.follow_symlinks).with_format(None)
    label = os.fspath(source) if isinstance(source, str | os.PathLike) else "the stream"
    features = stream.features
    for column, feature in (features or {}).items():
        undecoded = _undecoded(feature)
        if undecoded is not feature:
            stream = stream.cast_column(column, undecoded)
    if limit is not None:
        stream = stream.take(limit)
    return stream.map(
        _ToSamples(label, images, skip),
        with_indices=True,
        batched=True,
        batch_size=1,
        remove_columns=None if features is None else list(features),
    )


def as_datasets(samples: Any) -> Any:
    """Return a `datasets.Dataset` that makes each sample when it is asked for."""
    datasets = package("A data set of Hugging Face was asked for")
    indices = datasets.Dataset.from_dict({"index": range(len(samples))})
    return indices.with_transform(_ByIndex(samples))


class _ByIndex:
    """Turns a batch of indices into a batch of samples."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __call__(self, batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        rows = [self.samples[index] for index in batch["index"]]
        return {key: [row[key] for row in rows] for key in SAMPLE_KEYS}


class _ToSamples:
    """Turns a batch of one row into a batch of one sample, or of none where it is skipped."""

    def __init__(self, source: str, images: ImageFolder, skip: bool) -> None:
        self.source, self.images, self.skip = source, images, skip
        self.num_skipped = 0

    def __call__(self, batch: Mapping[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        from .samples import parse_row, sample_of

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


def _undecoded(feature: Any) -> Any:
    """Return a feature whose images come as bytes; the same object where it has none."""
    if type(feature).__name__ == "Image":
        changed = copy.copy(feature)
        changed.decode = False
        return changed
    if hasattr(feature, "feature"):
        inner = _undecoded(feature.feature)
        if inner is not feature.feature:
            changed = copy.copy(feature)
            changed.feature = inner
            return changed
    if isinstance(feature, dict):
        inner_of = {key: _undecoded(value) for key, value in feature.items()}
        if any(inner_of[key] is not feature[key] for key in feature):
            return type(feature)(inner_of)
    return feature
