# SPDX-License-Identifier: Apache-2.0
"""Digests, by which a run that is resumed knows whether what it depends on is still the same.

Files are read whole. Samples miss changes, and a time of modification changes with every copy, which would refuse runs
that may be resumed.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["file_digest", "file_digests", "joined"]


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the digest of each file; several are read at once."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_digest, paths))


def joined(texts: Iterable[str]) -> str:
    """Return one digest of several texts, or digests, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()
