# SPDX-License-Identifier: Apache-2.0
"""Data sets in a local folder: found by listing the folder, never by following paths in its metadata.

Folders are untrusted. The README of a folder, or the state of a saved data set, may name URLs and files elsewhere, and
`datasets.load_dataset` follows both. So the files are listed here, each must lie in the folder, and only the rows are
read.
"""

import glob
import importlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .._optional import needs
from .json_rows import JsonRows
from .rows import HubRows, JoinedRows, Rows
from .sample_errors import listed, shortened

__all__ = [
    "ALL_SPLITS",
    "arrow_datasets",
    "files_below",
    "folder_rows",
    "is_of_macos",
    "is_within",
    "package",
    "parquet_rows",
]

ALL_SPLITS = "*"
"""Value of `split` that takes the rows of all files."""

logger = logging.getLogger(__name__)

_STATE = "state.json"
_SPLITS = "dataset_dict.json"
_NO_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", _SPLITS, _STATE)
_KINDS = ((".parquet",), (".arrow",), (".json", ".jsonl"))
IN_MEMORY = 2**30
"""Parquet files of at most this many bytes in total are read into memory."""
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_WORD = re.compile(rf"(?:^|[-._ 0-9/\\])({'|'.join(_SPLIT_WORDS)})(?=$|[-._ 0-9/\\])")


def folder_rows(folder: str, split: str | None, name: str | None, follow_symlinks: bool) -> Rows:
    """Return the rows of a data set in a folder.

    Args:
        folder: the output of `save_to_disk`, or a folder with Parquet, Arrow, JSON or JSONL files in it or below it. If
            there are several kinds, the first in this order is read.
        split: recognised by the names of files and folders, such as `train-00000-of-00002.parquet`; files without such
            a word belong to "train". None for "train", or `ALL_SPLITS`.
        name: name of a configuration; must be None, since a folder has none.
        follow_symlinks: allow links that lead out of the folder.

    Raises:
        ValueError: the folder has no rows or no such split, or a file cannot be read or lies elsewhere.
        ImportError: a package that reads its files is missing.
    """
    files = _chosen_files(folder, split, name, follow_symlinks)
    if files[0].lower().endswith((".json", ".jsonl")):
        rows: list[Rows] = [JsonRows(file) for file in files]
        return rows[0] if len(rows) == 1 else JoinedRows(rows)
    return parquet_rows(files, folder)


def arrow_datasets(folder: str, split: str | None, name: str | None, follow_symlinks: bool) -> list[Any]:
    """Return the `datasets.Dataset` of each Parquet or Arrow file of a folder; see `folder_rows`.

    Raises:
        ValueError: see `folder_rows`; or the rows are JSON.
    """
    files = _chosen_files(folder, split, name, follow_symlinks)
    if files[0].lower().endswith((".json", ".jsonl")):
        raise ValueError(f"{folder!r} has JSON rows, which are always read one by one; leave streaming out.")
    return _opened(files)


def parquet_rows(files: Sequence[str], name: str) -> Rows:
    """Return the rows of Parquet files, or of the Arrow files of the data set `name`.

    Raises:
        ValueError: a file cannot be read.
        ImportError: a package that reads them is missing.
    """
    opened = _opened(files)
    if files[0].lower().endswith(".arrow"):
        return HubRows(opened[0] if len(opened) == 1 else package(name).concatenate_datasets(opened), name, files)
    rows: list[Rows] = [HubRows(one, file, [file]) for one, file in zip(opened, files, strict=True)]
    return rows[0] if len(rows) == 1 else JoinedRows(rows)


def is_of_macos(name: str) -> bool:
    """Return whether a file, named relative to its folder, is macOS metadata: ._NAME, __MACOSX/."""
    return os.path.basename(name).startswith("._") or "__MACOSX" in name.split(os.sep)


def files_below(folder: str, follow_links: bool = True) -> Iterator[str]:
    """Yield the files in a folder and below it, in order of their names.

    Args:
        folder: the top folder.
        follow_links: enter linked folders too; each folder is visited once, so cycles of links end.

    Raises:
        OSError: a folder cannot be listed.
    """
    seen = {_identity(folder)}

    def fail(error: OSError) -> None:
        raise error

    for here, folders, names in os.walk(folder, onerror=fail, followlinks=follow_links):
        fresh = []
        for below in sorted(folders):
            path = os.path.join(here, below)
            if os.path.islink(path) and not follow_links:
                continue
            identity = _identity(path)
            if identity not in seen:
                seen.add(identity)
                fresh.append(below)
        folders[:] = fresh
        yield from (os.path.join(here, file) for file in sorted(names))


def is_within(path: str, folder: str) -> bool:
    """Return whether a path is the folder or lies below it; both absolute and normalized."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def package(why: str) -> Any:
    """Return the package `datasets`.

    Raises:
        ImportError: it is missing or cannot be imported; the message begins with `why`.
    """
    with needs("datasets", f"{why}, which", 'pip install "transformers-fastvlm[training]"'):
        return importlib.import_module("datasets")


def _identity(folder: str) -> tuple[int, int] | str:
    status = os.stat(folder)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def _chosen_files(folder: str, split: str | None, name: str | None, follow_symlinks: bool) -> list[str]:
    """Return the files with the rows of one split, in order, each of them in the folder."""
    if name is not None:
        raise ValueError(
            f"name is {name!r}, but {folder!r} is a local folder, which has no configurations. Name the folder with "
            "the files of that configuration."
        )
    if os.path.isfile(os.path.join(folder, _SPLITS)):
        named = _read_json(os.path.join(folder, _SPLITS), folder).get("splits")
        splits = [_plain_name(one, folder, _SPLITS) for one in named] if isinstance(named, list) else []
        folder = os.path.join(folder, _one_of(splits, split, folder))
        split = None
        if not os.path.isfile(os.path.join(folder, _STATE)):
            raise ValueError(f"{folder!r} has no {_STATE}: the saved data set is incomplete. Save or copy it again.")
    if os.path.isfile(os.path.join(folder, _STATE)):
        if split not in (None, "train", ALL_SPLITS):
            raise ValueError(f"{folder!r} is one saved data set and has no split {split!r}; leave split out.")
        files = _saved_files(folder)
    else:
        files = _listed_files(folder, split, follow_symlinks)
    real = os.path.realpath(folder)
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(f"{file!r} is missing or not a regular file. Save or copy the data set again.")
        if not follow_symlinks and not is_within(os.path.realpath(file), real):
            raise ValueError(
                f"{file!r} leaves the folder {folder!r} by a symbolic link. Copy the file there, or allow it with "
                "follow_symlinks=True (--follow-symlinks) if you made the link."
            )
    return files


def _listed_files(folder: str, split: str | None, follow_symlinks: bool) -> list[str]:
    below = [
        file
        for file in files_below(folder, follow_symlinks)
        if not os.path.basename(file).startswith(".") and os.path.basename(file) not in _NO_ROWS
    ]
    found = {kind: [file for file in below if file.lower().endswith(kind)] for kind in _KINDS}
    kinds = [kind for kind in _KINDS if found[kind]]
    if not kinds:
        raise ValueError(
            f"the folder {folder!r} has no rows; expected Parquet, Arrow, JSON or JSONL files in it, or the output of "
            "save_to_disk."
        )
    if len(kinds) > 1:
        others = sum(len(found[kind]) for kind in kinds[1:])
        logger.warning("%s: only the %s files are read; %d other data files are ignored.", folder, kinds[0][0], others)
    if split == ALL_SPLITS:
        return found[kinds[0]]
    by_split: dict[str, list[str]] = {}
    for file in found[kinds[0]]:
        words = _WORD.findall(os.path.relpath(file, folder).lower())
        by_split.setdefault(_SPLIT_WORDS[words[-1]] if words else "train", []).append(file)
    return by_split[_one_of(list(by_split), split, folder)]


def _one_of(splits: Sequence[str], wanted: str | None, folder: str) -> str:
    if wanted == ALL_SPLITS:
        where = os.path.join(folder, splits[0] if splits else "train")
        raise ValueError(f"{folder} has the splits {', '.join(splits)}; name the folder of one, such as {where}.")
    chosen = wanted or "train"
    if chosen in splits:
        return chosen
    raise ValueError(f"{folder!r} has no split {chosen!r}; it has {listed(splits)}. Choose one with split (--split).")


def _saved_files(folder: str) -> list[str]:
    named = _read_json(os.path.join(folder, _STATE), folder).get("_data_files")
    if not isinstance(named, list) or not named:
        raise ValueError(f"{os.path.join(folder, _STATE)!r} names no files of rows. Save or copy the data set again.")
    names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in named]
    return [os.path.join(folder, _plain_name(name, folder, _STATE)) for name in names]


def _plain_name(name: Any, folder: str, where: str) -> str:
    """Return a name that a metadata file mentions, after checking that it names an entry directly in the folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]|::", name):
        raise ValueError(
            f"{os.path.join(folder, where)!r} names {shortened(name)}; expected the name of a file or folder in that "
            "folder. Nothing outside of it is read."
        )
    return name


def _read_json(path: str, folder: str) -> dict[str, Any]:
    if not is_within(os.path.realpath(path), os.path.realpath(folder)):
        raise ValueError(f"{path!r} leaves the folder {folder!r} by a symbolic link. Copy the file there.")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path!r} is not JSON ({type(error).__name__}). Save or copy the data set again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path!r} holds a {type(content).__name__}; expected a JSON object.")
    return content


def _opened(files: Sequence[str]) -> list[Any]:
    """Return the data set of each file."""
    datasets = package(f"{files[0]!r} holds rows")
    in_memory = sum(map(os.path.getsize, files)) <= IN_MEMORY
    return [_open(file, datasets, in_memory) for file in files]


def _open(file: str, datasets: Any, in_memory: bool) -> Any:
    pa, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    path = os.path.abspath(file)
    try:
        if path.lower().endswith(".arrow"):
            return datasets.Dataset.from_file(path)
        if in_memory:
            return datasets.Dataset(datasets.table.InMemoryTable(parquet.read_table(path)))
        # Large files are converted once, to memory-mapped files in the cache of `datasets`. fsspec reads "::" in a name
        # as a URL, and brackets as a pattern.
        if "::" in path:
            raise ValueError("the package datasets reads '::' in a file name as a URL; rename the file.")
        return datasets.Dataset.from_parquet(glob.escape(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read as {'Arrow' if path.endswith('.arrow') else 'Parquet'}: {error}"
        ) from error
