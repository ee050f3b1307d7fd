# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear under their name only when they are complete and on the disk.

Permissions are those that the user's umask gives, as for any file that a program creates.
"""

import contextlib
import filecmp
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

__all__ = [
    "new_directory",
    "partial_of",
    "publish_directory",
    "replacing",
    "require_new",
    "state_of",
    "sync_directory",
    "sync_tree",
    "write_lines",
]

_PARTIAL = ".partial"


def partial_of(path: str | os.PathLike[str]) -> Path:
    """Return the name that `replacing` writes a file under until it is complete."""
    real = Path(os.path.realpath(path))
    return real.with_name(real.name + _PARTIAL)


def state_of(path: str | os.PathLike[str]) -> list[int] | None:
    """Return what changes when a file does: its size and modification time; None if there is no file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], only: tuple[Any, ...] | None = None, sync: bool = True
) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its place at the end, or goes away after an error.

    Where `path` is a link, that is the place of what it leads to. One process at a time may write to a path.

    Args:
        path: of the file.
        only: the states of a file in its place that may be replaced, see `state_of`; None for any. No file, and one
            that has the same bytes, may always be.
        sync: force the file to the disk first; False where a power cut may cost it.

    Raises:
        FileExistsError: another file is there, which is left as it is.
    """
    real, partial = Path(os.path.realpath(path)), partial_of(path)
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed; or a link, which is not followed
        with open(partial, "xb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if only is not None and state_of(real) not in (None, *only) and not filecmp.cmp(real, partial, shallow=False):
            raise FileExistsError(
                f"{str(real)!r} appeared, or was changed, since the run began, and is not replaced. Move it away and "
                "give the same command again; what was done is kept."
            )
        os.replace(partial, real)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if sync:
        sync_directory(real.parent)


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write a text file in UTF-8, whole or not at all; half characters, which UTF-8 lacks, become question marks."""
    with replacing(path) as file:
        for line in lines:
            file.write((line + "\n").encode("utf-8", "replace"))


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a hidden directory beside `out` that becomes `out` at the end, or disappears on any error.

    Where `out` is a link, that is beside the directory that it leads to.

    Raises:
        FileExistsError: `out` exists and is not an empty directory.
    """
    require_new(out)
    final = Path(os.path.realpath(out))
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.parent / f".{final.name}.incomplete-{secrets.token_hex(6)}"
    partial.mkdir()
    try:
        yield partial
        publish_directory(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_new(out: Path) -> None:
    """Raise FileExistsError unless there is nothing, or an empty directory, of a name."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty directory. Choose a new one; nothing is overwritten.")


def publish_directory(written: Path, final: Path, aside: Path | None = None) -> None:
    """Give a directory that is complete its final name, on the same disk.

    Args:
        written: the directory.
        final: its name. There may be an empty directory.
        aside: where another directory of that name is moved.

    Raises:
        OSError: a directory of that name is not empty, and there is no `aside` for it.
    """
    sync_tree(written)
    if final.exists():
        final.rmdir() if aside is None else final.rename(aside)
    written.rename(final)
    sync_directory(final.parent)


def sync_tree(directory: Path) -> None:
    """Force every file below a directory, and the directories' entries, to the disk."""
    mode = "rb+" if os.name == "nt" else "rb"  # Windows forces only what may be written
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(folder, name), mode) as stream:
                os.fsync(stream.fileno())
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Force a directory's entries to the disk, where the system can do that."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
