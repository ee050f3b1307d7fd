# SPDX-License-Identifier: Apache-2.0
"""The identity of a checkpoint, by which a resumed run detects a changed one."""

import os
from collections.abc import Callable
from pathlib import Path

from ..storage.digests import counted_bytes, file_digests
from .embedded import resolve_model

__all__ = ["checkpoint_identity"]

_FILES = (".json", ".safetensors", ".txt", ".jinja", ".model", ".bin", ".onnx", ".onnx_data", ".gguf")


def checkpoint_identity(model: str, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, str]:
    """Return digests of all files of a checkpoint, or the commit of a checkpoint on the hub.

    Weights are read completely, as loading does afterwards.

    Args:
        model: directory or hub repository.
        progress: called with the bytes read so far and of all files.

    Raises:
        OSError: the checkpoint does not exist, or a file cannot be read.
    """
    model = resolve_model(model)
    if os.path.isdir(model):
        found = sorted(path for path in Path(model).rglob("*") if path.suffix in _FILES and path.is_file())
        names = [path.relative_to(model).as_posix() for path in found]
        return dict(zip(names, file_digests(found, counted_bytes(progress, found)), strict=True))
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    return {"commit": str(extract_commit_hash(cached_file(model, "config.json"), None))}
