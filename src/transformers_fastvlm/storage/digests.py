# SPDX-License-Identifier: Apache-2.0
"""Digests, by which a resumed run detects changes of its inputs.

Files are read completely: partial reads miss changes, and modification times change with every copy.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["file_digest", "file_digests", "joined"]


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the digest of each file; several files are read in parallel."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_digest, paths))


def joined(texts: Iterable[str]) -> str:
    """Return one digest of several texts, or digests, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()
