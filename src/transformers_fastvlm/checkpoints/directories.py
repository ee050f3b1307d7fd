# SPDX-License-Identifier: Apache-2.0
"""Directories that appear under their name only when they are complete."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .files import sync_directory

__all__ = ["new_directory", "sync_tree"]


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a hidden directory beside `out` that becomes `out` at the end, or disappears on any error.

    Raises:
        FileExistsError: `out` exists and is not an empty directory.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty directory. Choose a new one; nothing is overwritten.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.incomplete-", dir=out.parent))
    try:
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
        yield partial
        sync_tree(partial)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
        sync_directory(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync_tree(directory: Path) -> None:
    """Force every file below a directory, and the directories' entries, to the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(folder, name), "rb") as stream:
                os.fsync(stream.fileno())
        sync_directory(Path(folder))
