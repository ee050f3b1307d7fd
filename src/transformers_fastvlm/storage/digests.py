# SPDX-License-Identifier: Apache-2.0
"""Digests, by which a resumed run detects changes of its inputs.

Files are read completely: partial reads miss changes, and modification times change with every copy.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["counted_bytes", "file_digest", "file_digests", "joined"]

_CHUNK = 2**22


def file_digest(path: str | os.PathLike[str], advance: Callable[[int], None] = lambda size: None) -> str:
    """Return the SHA-256 of a file.

    Args:
        path: the file.
        advance: called with the number of bytes of each chunk that was read.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def file_digests(
    paths: Sequence[str | os.PathLike[str]], advance: Callable[[int], None] = lambda size: None
) -> list[str]:
    """Return the digest of each file; several files are read in parallel.

    `advance` is as for `file_digest`, and called from several threads. If it raises, or a file cannot be read, or the
    user presses Ctrl-C, no file is read further.
    """
    stopped = threading.Event()

    def read(size: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        advance(size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            return list(pool.map(lambda path: file_digest(path, read), paths))
        finally:
            stopped.set()


def counted_bytes(
    progress: Callable[[int, int], None], paths: Iterable[str | os.PathLike[str]]
) -> Callable[[int], None]:
    """Return `advance` of `file_digests`, which calls `progress` with the bytes read so far and of all files.

    Raises:
        OSError: a file does not exist.
    """
    total, done, lock = sum(os.stat(path).st_size for path in paths), 0, threading.Lock()

    def advance(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress(done, total)

    return advance


def joined(texts: Iterable[str]) -> str:
    """Return one digest of several texts, or digests, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()
