# SPDX-License-Identifier: Apache-2.0
"""From a source to rows: files, folders, lists in memory, and data sets of Hugging Face's `datasets`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..images.read_options import ReadOptions
from .folders import arrow_datasets, folder_rows, package, parquet_rows
from .image_files import ImageFolder
from .json_rows import JsonRows
from .rows import HubRows, ListRows, Rows
from .sample_errors import listed, shortened

__all__ = ["Part", "open_dataset", "open_part", "source_name"]

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Part:
    """Rows, and the folder of their images."""

    rows: Rows
    images: ImageFolder


def open_part(
    source: Any, image_folder: Any, split: str | None, name: str | None, follow_symlinks: bool, reading: ReadOptions
) -> Part:
    """Return the rows of one source and the folder of their images; see `load`. The source may be damaged."""
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
        dataset = open_dataset(source, split, name, False, follow_symlinks)
        rows = HubRows(dataset, source_name(source))
    return Part(rows, ImageFolder(image_folder, follow_symlinks, reading))


def open_dataset(source: Any, split: str | None, name: str | None, streaming: bool, follow_symlinks: bool) -> Any:
    """Return a `datasets.Dataset`, or with `streaming` an `IterableDataset`.

    Args:
        source: such an object, or a name on the hub; with `streaming` also a folder, see `folders.folder_rows`.
        split: name of the split; "train" by default.
        name: name of the configuration.
        streaming: return an `IterableDataset`.
        follow_symlinks: see `folders.folder_rows`.

    Raises:
        ValueError: the source is something else, or it has several splits and none was chosen.
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
            raise ValueError(f"the data set has no split {wanted!r}; it has {listed(source)}.")
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
    """Refuse a name that is a file or a URL instead of a data set on the hub.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the name is a URL, is empty, or is a path that exists but is not a regular file.
    """
    if not path:
        raise ValueError("the source is ''; expected a .json or .jsonl file, a folder, or a data set on the hub.")
    if "://" in path or "::" in path:
        raise ValueError(f"the source {shortened(path)} is a URL; URLs are not fetched. Download the file first.")
    if os.path.lexists(path):
        raise ValueError(f"the source {shortened(path)} exists, but is not a regular file or a folder.")
    if path.endswith((".json", ".jsonl", ".parquet", ".arrow")) or not _HUB_NAME.fullmatch(path):
        raise FileNotFoundError(f"the file {shortened(path)} does not exist.")


def source_name(source: Any) -> str:
    """Return the name of a source in messages."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return "the list of rows" if isinstance(source, list | tuple) else f"the {type(source).__name__}"
