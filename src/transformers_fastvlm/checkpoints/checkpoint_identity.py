# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is known by, for a run that is resumed with it."""

import os
from pathlib import Path

from ..storage.digests import file_digests
from .embedded import resolve_model

__all__ = ["checkpoint_identity"]

_FILES = (".json", ".safetensors", ".txt", ".jinja", ".model", ".bin", ".onnx", ".onnx_data")


def checkpoint_identity(model: str) -> dict[str, str]:
    """Return digests of all of a checkpoint's files, or the commit of one on the hub.

    Weights are read whole, as loading does afterwards.

    Raises:
        OSError: there is no such checkpoint, or a file cannot be read.
    """
    model = resolve_model(model)
    if os.path.isdir(model):
        found = sorted(path for path in Path(model).rglob("*") if path.suffix in _FILES and path.is_file())
        names = [path.relative_to(model).as_posix() for path in found]
        return dict(zip(names, file_digests(found), strict=True))
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    return {"commit": str(extract_commit_hash(cached_file(model, "config.json"), None))}
