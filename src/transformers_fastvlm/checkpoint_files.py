# SPDX-License-Identifier: Apache-2.0
"""Files of a checkpoint on disk: JSON objects, and the location of each tensor in safetensors files.

Loading, converting and the tools check files with these functions, so all of them refuse the same files. The
safetensors library checks that a file is valid; this module adds the position of each tensor in it. Format: 8 bytes
with the length of the header, the header in JSON, the tensors' bytes, little-endian.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "Stored",
    "StoredTensor",
    "read_directory",
    "read_index",
    "read_json",
    "read_tensors",
    "refuse_integers",
    "refuse_two_values",
    "same_values",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BLOCK = 16 * 2**20
"""Bytes held in memory at a time."""

_WEIGHTS = ("F64", "F32", "BF16", "F16")
_COUNTERS = (".num_batches_tracked",)
_OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "tf_model.h5")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `nbytes` bytes from `start`. Writing it appends `extra_rows` copies of the first row."""

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
        """Return this tensor truncated to its first `rows` rows, or extended to `rows` with copies of its first row."""
        missing = rows - self.shape[0]
        shape = (rows, *self.shape[1:])
        if missing >= 0:
            return replace(self, shape=shape, extra_rows=missing)
        return replace(self, shape=shape, nbytes=rows * self.row_bytes)

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes in blocks of at most `BLOCK`."""
        with self.file.open("rb") as stream:
            yield from _read(stream, self.file, self.start, self.nbytes)
            for _ in range(self.extra_rows):
                yield from _read(stream, self.file, self.start, self.row_bytes)


def _read(stream: Any, file: Path, start: int, nbytes: int) -> Iterator[bytes]:
    stream.seek(start)
    while nbytes:
        block = stream.read(min(BLOCK, nbytes))
        if not block:
            raise ValueError(f"{file} became shorter while it was read. Do not change the files while converting.")
        nbytes -= len(block)
        yield block


class Stored(Protocol):
    """A tensor in a file of any format.

    Attributes:
        dtype: as safetensors names it.
    """

    @property
    def file(self) -> Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def blocks(self) -> Iterator[bytes]: ...


def same_values(first: Stored, second: Stored) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(a == b for a, b in zip(first.blocks(), second.blocks(), strict=True))


def refuse_two_values(tensors: Mapping[str, Sequence[Stored]]) -> None:
    """Raise ValueError if a tensor is stored more than once with different values.

    Args:
        tensors: all stored copies of each tensor, in several files or under Apple's name and ours.
    """
    for name, found in tensors.items():
        if not all(same_values(found[0], other) for other in found[1:]):
            files = dict.fromkeys(str(tensor.file) for tensor in found)
            raise ValueError(
                f"{name} is stored {len(found)} times with different values, under Apple's name and under ours or in "
                f"several files: {', '.join(files)}. Keep one of them, or fetch the checkpoint again."
            )


def refuse_integers(tensors: Mapping[str, Stored]) -> None:
    """Raise ValueError if a weight's dtype is not floating-point with at least 16 bits.

    Integers and 8-bit floats are meaningless without the scales of their quantization.
    """
    wrong = [name for name, t in tensors.items() if t.dtype not in _WEIGHTS and not name.endswith(_COUNTERS)]
    if wrong:
        first = tensors[wrong[0]]
        raise ValueError(
            f"{first.file} holds {len(wrong)} tensors that are not weights: {wrong[0]} has dtype {first.dtype}, "
            f"expected one of {', '.join(_WEIGHTS)}. If it is quantized, config.json needs a quantization_config; "
            "otherwise save it again from the full weights."
        )


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


def read_index(file: Path) -> dict[str, str]:
    """Return the file name of each tensor, from the index of a sharded checkpoint.

    Raises:
        ValueError: the file is not an index, or names a file outside its own directory.
    """
    found = read_json(file).get("weight_map")
    weight_map: dict[str, str] = found if isinstance(found, dict) else {}
    names = weight_map.values()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file} has no weight_map of tensor names to file names. Fetch it again.")
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise ValueError(
                f"{file} names the shard {name!r}; expected the name of a file in the same directory. Do not trust "
                "this checkpoint."
            )
    return weight_map


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint directory by name, from one file or from the shards of an index.

    Raises:
        FileNotFoundError: there are no safetensors files, or a shard of the index is missing.
        ValueError: a damaged file or index, a shard outside the directory, or an index that contradicts its shards.
    """
    if (directory / SINGLE_FILE).is_file():
        return read_tensors(directory / SINGLE_FILE)
    if not (directory / INDEX_FILE).is_file():
        others = [name for name in _OTHER_WEIGHTS if (directory / name).exists()]
        hint = f"It has {', '.join(others)}; save the model as safetensors first." if others else "Fetch it again."
        raise FileNotFoundError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}. {hint}")

    weight_map = read_index(directory / INDEX_FILE)
    shards = list(dict.fromkeys(weight_map.values()))
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
                f"{directory / shard} contradicts {INDEX_FILE}: missing "
                f"{sorted(promised - found.keys())[:5]}, unexpected {sorted(found.keys() - promised)[:5]}. "
                "The files belong to different checkpoints."
            )
        tensors.update(found)
    return tensors
