# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear under their name only when they are complete and on disk.

Permissions follow the user's umask.
"""

import contextlib
import errno
import filecmp
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

__all__ = [
    "DISK_FULL",
    "naming",
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
DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""Error numbers of a write without space: the disk, the user's quota or the largest file size is reached."""


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add a path to an error about space in the block; the system names no file when a write fails."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL and error.filename is None:
            error.filename = os.fspath(path)
        raise


def partial_of(path: str | os.PathLike[str]) -> Path:
    """Return the temporary name under which `replacing` writes a file."""
    real = Path(os.path.realpath(path))
    return real.with_name(real.name + _PARTIAL)


def state_of(path: str | os.PathLike[str]) -> list[int] | None:
    """Return the size and modification time of a file, to detect changes; None if there is no file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], only: tuple[Any, ...] | None = None, sync: bool = True
) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` at the end, or is deleted after an error.

    If `path` is a link, its target is replaced. Only one process at a time may write to a path.

    Args:
        path: path of the file.
        only: states of an existing file that may be replaced, see `state_of`; None for any. A missing file, and a file
            with the same bytes, may always be replaced.
        sync: sync the file to disk first; False if losing it in a power failure is acceptable.

    Raises:
        FileExistsError: another file exists, which is not changed.
    """
    real, partial = Path(os.path.realpath(path)), partial_of(path)
    try:
        partial.unlink(missing_ok=True)  # left by a killed process; a link is removed, not followed
        with naming(path), open(partial, "xb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if only is not None and state_of(real) not in (None, *only) and not filecmp.cmp(real, partial, shallow=False):
            raise FileExistsError(
                f"{str(real)!r} appeared, or was changed, since the run began, and is not replaced. Move it away and "
                "run the same command again; finished work is saved."
            )
        os.replace(partial, real)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if sync:
        sync_directory(real.parent)


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write a text file in UTF-8 atomically; lone surrogates, which UTF-8 cannot encode, become question marks."""
    with replacing(path) as file:
        for line in lines:
            file.write((line + "\n").encode("utf-8", "replace"))


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a hidden directory next to `out` that becomes `out` at the end, or is deleted on any error.

    If `out` is a link, its target is written.

    Raises:
        FileExistsError: `out` exists and is not an empty directory.
    """
    require_new(out)
    final = Path(os.path.realpath(out))
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.parent / f".{final.name}.incomplete-{secrets.token_hex(6)}"
    partial.mkdir()
    try:
        with naming(out):
            yield partial
        publish_directory(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_new(out: Path) -> None:
    """Raise FileExistsError unless a path does not exist or is an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty directory. Choose a new one; nothing is overwritten.")


def publish_directory(written: Path, final: Path, aside: Path | None = None) -> None:
    """Rename a complete directory to its final name, on the same file system.

    Args:
        written: the directory.
        final: its final name; an empty directory of that name is replaced.
        aside: path that an existing directory of that name is moved to.

    Raises:
        OSError: a directory of that name is not empty, and there is no `aside`.
    """
    sync_tree(written)
    if final.exists():
        final.rmdir() if aside is None else final.rename(aside)
    written.rename(final)
    sync_directory(final.parent)


def sync_tree(directory: Path) -> None:
    """Sync every file below a directory, and the entries of its directories, to disk."""
    mode = "rb+" if os.name == "nt" else "rb"  # Windows syncs only writable files
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(folder, name), mode) as stream:
                os.fsync(stream.fileno())
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Sync a directory's entries to disk, if the system supports it."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
