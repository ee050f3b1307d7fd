# SPDX-License-Identifier: Apache-2.0
"""Inputs of a run: files, folders, patterns and tables, as requests in a fixed order."""

import functools
import glob
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..data.folders import files_below, is_of_macos
from ..images.read_options import ReadOptions
from ..storage.digests import counted_bytes, joined
from .requests import PromptTemplate, Request, SourceOptions, printable
from .table_sources import TableSource, open_table
from .text_sources import TEXTS, TextSource
from .video_frames import count_frames, require_av, video_requests

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TABLES", "VIDEOS", "Inputs", "Source", "find_sources"]

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
VIDEOS = (
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".3gp", ".wmv", ".flv", ".ogv",
)  # fmt: skip


class FileSource:
    """Images and videos.

    Args:
        name: the input as given by the user.
        files: paths of the files.
        options: options for requests.
    """

    def __init__(self, name: str, files: Sequence[str], options: SourceOptions) -> None:
        self.name, self.files, self.options = name, list(files), options

    def identity(self, advance: Callable[[int], None]) -> dict[str, Any]:
        """Return name, number of files, and a digest of their names and sizes; nothing is read."""
        digest = joined(f"{printable(file)}\0{_size_of(file)}" for file in self.files)
        return {"name": printable(self.name), "count": len(self.files), "digest": digest}

    def rows(self) -> int | None:
        """Return the number of images and, if the files state it, of frames."""
        counts = [count_frames(file, self.options.every) if is_video(file) else 1 for file in self.files]
        return None if None in counts else sum(count or 0 for count in counts)

    def __iter__(self) -> Iterator[Request]:
        for file in self.files:
            if is_video(file):
                yield from video_requests(file, self.options)
            else:
                opened = functools.partial(_open, file, self.options)
                yield Request(source=printable(file), question=self.options.prompt, open_image=opened, file=file)


Source: TypeAlias = FileSource | TableSource | TextSource
"""An input of the user: its requests in a fixed order, their number, and its identity."""


@dataclass(frozen=True)
class Inputs:
    """All inputs of a run.

    Attributes:
        sources: sources in the user's order.
        left_out: number of skipped files in folders, neither readable images nor videos, by suffix.
    """

    sources: tuple[Source, ...]
    left_out: Mapping[str, int]

    def __iter__(self) -> Iterator[Request]:
        for source in self.sources:
            yield from source

    def identity(self, reading: Callable[[int, int], None] = lambda done, total: None) -> list[dict[str, Any]]:
        """Return the identity of the inputs, which changes with them.

        Args:
            reading: called with the bytes read so far and of all tables and text files, which are read completely.
        """
        advance = counted_bytes(reading, [each.name for each in self.sources if not isinstance(each, FileSource)])
        return [source.identity(advance) for source in self.sources]

    def rows(self) -> int | None:
        """Return the approximate number of requests; None if it is unknown."""
        counts = [source.rows() for source in self.sources]
        return None if None in counts else sum(count or 0 for count in counts)

    def videos(self) -> list[str]:
        """Return the videos, in order."""
        files = [file for source in self.sources if isinstance(source, FileSource) for file in source.files]
        return [file for file in files if is_video(file)]

    def read_files(self) -> list[str]:
        """Return the input files: images, videos and tables."""
        return [
            file
            for source in self.sources
            for file in (source.files if isinstance(source, FileSource) else [source.name])
        ]

    def only_videos(self) -> bool:
        """Whether all inputs are videos."""
        return all(isinstance(source, FileSource) and all(map(is_video, source.files)) for source in self.sources)


def find_sources(inputs: Sequence[str], options: SourceOptions) -> Inputs:
    """Return the sources that the user named.

    Args:
        inputs: files (images, videos, tables), folders, which are searched with their subfolders, and patterns such
            as `photos/**/*.jpg`. An existing file with such a name takes precedence over the pattern.
        options: options for requests.

    Raises:
        ValueError: there are no inputs, a pattern or a folder has no image or video, a table cannot be used, the
            prompt has unknown columns, or an option is out of range.
        OSError: a file does not exist.
        ImportError: the package that reads Parquet or videos is not installed.
    """
    if not inputs:
        raise ValueError("no input is given; expected files, folders, patterns or tables.")
    if not 0 < options.every < math.inf:
        raise ValueError(f"every is {options.every}; expected seconds above 0.")
    sources: list[Source] = []
    left_out: Counter[str] = Counter()
    for name in inputs:
        if os.path.isdir(name):
            files, others = _in_folder(name)
            left_out += others
            if not files:
                raise ValueError(f"the folder {name!r} has no image and no video ({_listed(others)}).")
            sources.append(FileSource(name, files, options))
        elif not os.path.lexists(name) and glob.has_magic(name):
            files = sorted(file for file in glob.iglob(name, recursive=True) if os.path.isfile(file))
            if not files:
                raise ValueError(f"no file matches {name!r}.")
            sources.append(FileSource(name, files, options))
        elif not os.path.exists(name):
            raise FileNotFoundError(f"no such file or folder: {name!r}.")
        elif not os.path.isfile(name):
            raise ValueError(f"{name!r} is not a regular file; expected a file or a folder.")
        elif name.lower().endswith(TABLES):
            sources.append(open_table(name, options))
        elif options.text_files and name.lower().endswith(TEXTS):
            sources.append(TextSource(name, options))
        else:
            sources.append(FileSource(name, [name], options))
    found = Inputs(tuple(sources), left_out)
    columns = PromptTemplate(options.prompt).columns
    for source in sources:
        if columns and isinstance(source, FileSource):
            raise ValueError(
                f"the prompt has {{{columns[0]}}}, but {source.name!r} is not a table and has no columns. Write "
                f"{{{{{columns[0]}}}}} for literal braces."
            )
        if isinstance(source, FileSource) and any(file.lower().endswith(TABLES) for file in source.files):
            raise ValueError(f"{source.name!r} has tables; list them one by one, without a pattern.")
    if found.videos():
        require_av()
    return found


def is_video(file: str) -> bool:
    """Whether a file is a video, by its suffix."""
    return file.lower().endswith(VIDEOS)


def _in_folder(folder: str) -> tuple[list[str], Counter[str]]:
    """Return the images and videos in a folder and its subfolders, in order, and the numbers of other files by suffix.

    Links to folders are followed, each folder once. The metadata files of macOS are skipped.
    """
    from ..images.formats import image_suffixes

    suffixes = (*image_suffixes(), *VIDEOS)
    files: list[str] = []
    others: Counter[str] = Counter()
    for file in files_below(folder):
        if is_of_macos(os.path.relpath(file, folder)):
            continue
        if file.lower().endswith(suffixes):
            files.append(file)
        else:
            others[os.path.splitext(file)[1].lower() or "no suffix"] += 1
    return files, others


def _listed(others: Counter[str]) -> str:
    """Return the numbers of files by suffix as text, with the packages to install for them."""
    from ..images.formats import advice_about

    shown = ", ".join(f"{number:,} {suffix}" for suffix, number in others.most_common(5)) or "no other files"
    return shown + advice_about(others)


def _open(file: str, options: ReadOptions) -> "Image":
    from ..images.reading import as_shown, read_file

    if not os.path.isfile(file):
        raise FileNotFoundError(f"the image file {file!r} no longer exists.")
    return as_shown(read_file(file, f"the image file {file!r}", options.max_pixels), options)


def _size_of(file: str) -> int:
    """Return a file's size, or -1 if it has none, as for a broken link."""
    try:
        return os.path.getsize(file)
    except OSError:
        return -1
