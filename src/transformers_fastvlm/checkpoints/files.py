# SPDX-License-Identifier: Apache-2.0
"""Writing safetensors directories as bytes: tensors are copied from file to file and never decoded.

So tensors of every dtype are bit-exact, and memory use is one block of a file for models of any size. Reading is in
`checkpoint_files`.
"""

import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint_files import INDEX_FILE, SINGLE_FILE, StoredTensor

__all__ = ["write_directory", "write_json", "write_tensors"]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON and sync it to disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def write_tensors(
    file: Path, tensors: dict[str, StoredTensor], advance: Callable[[str, int], None] = lambda name, nbytes: None
) -> None:
    """Copy tensors into a new safetensors file and sync it to disk.

    Args:
        file: path of the new file.
        tensors: tensors by their names in the file. Their order is that of the safetensors library: largest elements
            first, for alignment, then by name.
        advance: called with (name, bytes) after each block.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].item_bytes, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.written_bytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("xb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in order:
            for block in tensors[name].blocks():
                stream.write(block)
                advance(name, len(block))
        stream.flush()
        os.fsync(stream.fileno())


def write_directory(
    directory: Path,
    shards: Sequence[dict[str, StoredTensor]],
    advance: Callable[[str, int], None] = lambda name, nbytes: None,
) -> None:
    """Write a checkpoint's tensors: one file, or several with their index. Empty shards are left out."""
    shards = [shard for shard in shards if shard]
    if len(shards) == 1:
        write_tensors(directory / SINGLE_FILE, shards[0], advance)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / name, shard, advance)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(tensor.written_bytes for shard in shards for tensor in shard.values())
    write_json(
        directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
