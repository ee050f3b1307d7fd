# SPDX-License-Identifier: Apache-2.0
"""What a run is asked about: files, folders, patterns and tables, as requests in a fixed order."""

import functools
import glob
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..data.folders import files_below, is_of_macos
from ..images.read_options import ReadOptions
from ..storage.digests import joined
from .requests import PromptTemplate, Request, SourceOptions, printable
from .table_sources import TableSource, open_table
from .video_frames import count_frames, require_av, video_requests

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TABLES", "VIDEOS", "Inputs", "Source", "find_sources"]

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
VIDEOS = (
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".3gp", ".wmv", ".flv", ".ogv",
)  # fmt: skip


class FileSource:
    """Pictures and videos.

    Args:
        name: as the user named them.
        files: their paths.
        options: how requests are made.
    """

    def __init__(self, name: str, files: Sequence[str], options: SourceOptions) -> None:
        self.name, self.files, self.options = name, list(files), options

    def identity(self) -> dict[str, Any]:
        """Return name, number of files, and a digest of their names and sizes."""
        digest = joined(f"{printable(file)}\0{_size_of(file)}" for file in self.files)
        return {"name": printable(self.name), "count": len(self.files), "digest": digest}

    def rows(self) -> int | None:
        """Return the number of pictures and, as far as their files say, of frames."""
        counts = [count_frames(file, self.options.every) if is_video(file) else 1 for file in self.files]
        return None if None in counts else sum(count or 0 for count in counts)

    def __iter__(self) -> Iterator[Request]:
        for file in self.files:
            if is_video(file):
                yield from video_requests(file, self.options)
            else:
                opened = functools.partial(_open, file, self.options)
                yield Request(source=printable(file), question=self.options.prompt, picture=opened, file=file)


Source: TypeAlias = FileSource | TableSource
"""An input, as the user named it: its requests, the same each time, their number, and what it is known by."""


@dataclass(frozen=True)
class Inputs:
    """All inputs of a run.

    Attributes:
        sources: in the user's order.
        left_out: numbers of files in folders that are neither images that can be read nor videos, by suffix.
    """

    sources: tuple[Source, ...]
    left_out: Mapping[str, int]

    def __iter__(self) -> Iterator[Request]:
        for source in self.sources:
            yield from source

    def identity(self) -> list[dict[str, Any]]:
        """Return what is the same as long as the inputs are."""
        return [source.identity() for source in self.sources]

    def rows(self) -> int | None:
        """Return about how many requests there are; None if that is not known."""
        counts = [source.rows() for source in self.sources]
        return None if None in counts else sum(count or 0 for count in counts)

    def videos(self) -> list[str]:
        """Return the videos, in order."""
        files = [file for source in self.sources if isinstance(source, FileSource) for file in source.files]
        return [file for file in files if is_video(file)]

    def read_files(self) -> list[str]:
        """Return the files that are read: pictures, videos and tables."""
        return [
            file
            for source in self.sources
            for file in (source.files if isinstance(source, FileSource) else [source.name])
        ]

    def only_videos(self) -> bool:
        """Whether there is nothing but videos."""
        return all(isinstance(source, FileSource) and all(map(is_video, source.files)) for source in self.sources)


def find_sources(inputs: Sequence[str], options: SourceOptions) -> Inputs:
    """Return the sources that the user named.

    Args:
        inputs: files (pictures, videos, tables), folders, which are searched with all that is in them, and patterns
            such as `photos/**/*.jpg`. A file of that very name goes before a pattern.
        options: how requests are made.

    Raises:
        ValueError: nothing is named, a pattern or a folder has no picture or video, a table cannot be used, the prompt
            names columns that are not there, or an option is out of range.
        OSError: a file does not exist.
        ImportError: what reads Parquet or videos is not installed.
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
                raise ValueError(f"the folder {name!r} has no picture and no video ({_listed(others)}).")
            sources.append(FileSource(name, files, options))
        elif not os.path.lexists(name) and glob.has_magic(name):
            files = sorted(file for file in glob.iglob(name, recursive=True) if os.path.isfile(file))
            if not files:
                raise ValueError(f"no file matches {name!r}.")
            sources.append(FileSource(name, files, options))
        elif not os.path.exists(name):
            raise FileNotFoundError(f"no such file or folder: {name!r}.")
        elif not os.path.isfile(name):
            raise ValueError(f"{name!r} is no regular file; expected a file or a folder.")
        elif name.lower().endswith(TABLES):
            sources.append(open_table(name, options))
        else:
            sources.append(FileSource(name, [name], options))
    found = Inputs(tuple(sources), left_out)
    columns = PromptTemplate(options.prompt).columns
    for source in sources:
        if columns and isinstance(source, FileSource):
            raise ValueError(
                f"the prompt has {{{columns[0]}}}, but {source.name!r} is not a table and has no columns. Write "
                f"{{{{{columns[0]}}}}} for these very characters."
            )
        if isinstance(source, FileSource) and any(file.lower().endswith(TABLES) for file in source.files):
            raise ValueError(f"{source.name!r} has tables; name them one by one, not by a pattern.")
    if found.videos():
        require_av()
    return found


def is_video(file: str) -> bool:
    """Whether a file is a video, by its suffix."""
    return file.lower().endswith(VIDEOS)


def _in_folder(folder: str) -> tuple[list[str], Counter[str]]:
    """Return the images and videos in a folder and all below it, in order, and the numbers of other files by suffix.

    Linked folders are entered too, each folder once. What macOS keeps beside files is passed over.
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
    """Return numbers of files by suffix as text, with what to install for them."""
    from ..images.formats import advice_about

    shown = ", ".join(f"{number:,} {suffix}" for suffix, number in others.most_common(5)) or "no other files"
    return shown + advice_about(others)


def _open(file: str, options: ReadOptions) -> "Image":
    from ..images.reading import as_shown, read_file

    if not os.path.isfile(file):
        raise FileNotFoundError(f"the image file {file!r} does not exist any more.")
    return as_shown(read_file(file, f"the image file {file!r}", options.max_pixels), options)


def _size_of(file: str) -> int:
    """Return a file's size, or -1 for one that cannot be asked, such as a broken link."""
    try:
        return os.path.getsize(file)
    except OSError:
        return -1
