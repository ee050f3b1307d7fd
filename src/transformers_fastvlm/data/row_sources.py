# SPDX-License-Identifier: Apache-2.0
"""From what a user names to rows: files, folders, lists in memory, and data sets of Hugging Face's `datasets`."""

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
    """Rows, and where their images are."""

    rows: Rows
    images: ImageFolder


def open_part(
    source: Any, image_folder: Any, split: str | None, name: str | None, follow_symlinks: bool, reading: ReadOptions
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
        dataset = open_dataset(source, split, name, False, follow_symlinks)
        rows = HubRows(dataset, source_name(source))
    return Part(rows, ImageFolder(image_folder, follow_symlinks, reading))


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


def source_name(source: Any) -> str:
    """Return how a source is called in messages."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return "the list of rows" if isinstance(source, list | tuple) else f"the {type(source).__name__}"
