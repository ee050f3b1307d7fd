# SPDX-License-Identifier: Apache-2.0
"""Digests of files, by which a run that goes on knows whether they are still the same."""

import hashlib
import os
from collections.abc import Iterable

__all__ = ["fingerprint", "joined"]

_BLOCK, _BLOCKS = 2**16, 256


def fingerprint(path: str | os.PathLike[str], whole_up_to: int | None = None) -> str:
    """Return a digest of a file: of all of it, or of its size and evenly spread blocks.

    Args:
        path: of the file.
        whole_up_to: bytes; of a larger file only 256 blocks are read. None for all of any file.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(b"%d\n" % size)
    with open(path, "rb") as file:
        if whole_up_to is None or size <= max(whole_up_to, _BLOCK):
            while chunk := file.read(2**20):
                digest.update(chunk)
        else:
            for index in range(_BLOCKS):
                file.seek((size - _BLOCK) * index // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def joined(digests: Iterable[str]) -> str:
    """Return one digest of several, in order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
