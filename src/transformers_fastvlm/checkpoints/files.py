# SPDX-License-Identifier: Apache-2.0
"""Reading and writing safetensors directories as bytes: tensors are copied from file to file and never decoded.

So every dtype comes out bit for bit, and memory is bounded by one block of a file whatever the size of the model. The
safetensors library judges whether a file is sound; what is added here is where each tensor lies in it. Format:
8 bytes with the length of the header, the header in JSON, the tensors' bytes, little-endian.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

__all__ = [
    "StoredTensor",
    "read_directory",
    "read_json",
    "read_tensors",
    "same_values",
    "write_directory",
    "write_json",
    "write_tensors",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BLOCK = 16 * 2**20
"""Bytes held in memory at a time."""

_OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "tf_model.h5")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `nbytes` bytes from `start`, then, when written, `extra_rows` copies of the first row."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    extra_rows: int = 0

    @property
    def row_bytes(self) -> int:
        return self.nbytes // (self.shape[0] - self.extra_rows)

    @property
    def written_bytes(self) -> int:
        return self.nbytes + self.extra_rows * self.row_bytes if self.extra_rows else self.nbytes

    @property
    def item_bytes(self) -> int:
        return self.written_bytes // max(prod(self.shape), 1)

    def with_rows(self, rows: int) -> "StoredTensor":
        """Return this tensor cut to its first `rows` rows, or lengthened to `rows` by copies of its first row."""
        missing = rows - self.shape[0]
        shape = (rows, *self.shape[1:])
        if missing >= 0:
            return replace(self, shape=shape, extra_rows=missing)
        return replace(self, shape=shape, nbytes=rows * self.row_bytes)

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes, `BLOCK` at most at a time."""
        with self.file.open("rb") as stream:
            yield from _read(stream, self.file, self.start, self.nbytes)
            for _ in range(self.extra_rows):
                yield from _read(stream, self.file, self.start, self.row_bytes)


def _read(stream: Any, file: Path, start: int, nbytes: int) -> Iterator[bytes]:
    stream.seek(start)
    while nbytes:
        block = stream.read(min(BLOCK, nbytes))
        if not block:
            raise ValueError(f"{file} ended while it was read; it has become shorter. Leave it alone while converting.")
        nbytes -= len(block)
        yield block


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(a == b for a, b in zip(first.blocks(), second.blocks(), strict=True))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: the file is not JSON, or holds something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is damaged. Fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object. Fetch it again.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON and force it to the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or no safetensors file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist. Fetch the checkpoint again; it is incomplete.")
    try:
        with safe_open(file, framework="np") as checked:
            names = list(checked.keys())
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size:,} bytes) cannot be read as safetensors: {error}. It is truncated or "
            "damaged, or only a pointer to the real file; fetch it again."
        ) from error
    start = 8 + length
    tensors = {}
    for name in names:
        entry = header[name]
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)
    return tensors


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint directory by name, from one file or from the shards of an index.

    Raises:
        FileNotFoundError: there are no safetensors files, or a shard of the index is missing.
        ValueError: a damaged file or index, a shard outside the directory, or an index that does not fit its shards.
    """
    if (directory / SINGLE_FILE).is_file():
        return read_tensors(directory / SINGLE_FILE)
    if not (directory / INDEX_FILE).is_file():
        others = [name for name in _OTHER_WEIGHTS if (directory / name).exists()]
        hint = f"It has {', '.join(others)}; save the model as safetensors first." if others else "Fetch it again."
        raise FileNotFoundError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}. {hint}")

    index = read_json(directory / INDEX_FILE)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{directory / INDEX_FILE} has no weight_map of tensor names to file names. Fetch it again.")
    shards = list(dict.fromkeys(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
            raise ValueError(
                f"{directory / INDEX_FILE} names the shard {shard!r}; expected the name of a file in the same "
                "directory. Do not trust this checkpoint."
            )
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {len(missing)} of the {len(shards)} shards that its index names: {', '.join(missing)}. "
            "Fetch the checkpoint again."
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        found = read_tensors(directory / shard)
        promised = {name for name, file in weight_map.items() if file == shard}
        if found.keys() != promised:
            raise ValueError(
                f"{directory / shard} does not hold what {INDEX_FILE} says: missing "
                f"{sorted(promised - found.keys())[:5]}, not expected {sorted(found.keys() - promised)[:5]}. "
                "The files belong to different checkpoints."
            )
        tensors.update(found)
    return tensors


def write_tensors(
    file: Path, tensors: dict[str, StoredTensor], advance: Callable[[str, int], None] = lambda name, nbytes: None
) -> None:
    """Copy tensors into a new safetensors file and force it to the disk.

    Args:
        tensors: what to write, by the names to write it under. The order in the file is the library's: largest
            elements first, so that everything is aligned, then by name.
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
