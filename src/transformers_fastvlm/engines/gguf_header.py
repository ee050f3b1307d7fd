# SPDX-License-Identifier: Apache-2.0
"""Read the header of a GGUF file, to refuse a wrong file before llama.cpp, which may abort the process, sees it.

Source: docs/gguf.md of ggml (version 3 of the format).
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["GgufArray", "GgufHeader", "GgufTensor", "read_gguf_header"]

MAX_ENTRIES = 1 << 16
"""Maximum number of fields, and of tensors."""

MAX_KEY = 1 << 10
"""Maximum bytes of the name of a field or tensor."""

MAX_VALUE = 1 << 22
"""Maximum bytes of a field's text; chat templates are the longest."""

_START = struct.Struct("<4sIQQ")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Elements and bytes of a block, by type. The tensors of a language model have no others.
_BLOCKS = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    20: (32, 18),  # IQ4_NL
    23: (256, 136),  # IQ4_XS
    30: (1, 2),  # BF16
}


@dataclass(frozen=True)
class GgufArray:
    """An array of the metadata, without its values.

    Attributes:
        kind: the format's number of the values' type; 8 is text.
        length: number of values.
    """

    kind: int
    length: int


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        shape: the length of a row first, as in the format.
        kind: the format's number of its type, such as 0 for float32.
        start: position of its data in the file.
        nbytes: bytes of its data.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        metadata: the fields by name; arrays are `GgufArray`.
        tensors: by name, in the file's order.
    """

    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)


def read_gguf_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Read a header. A vocabulary of 152,000 tokens takes a tenth of a second; no weights are read.

    Raises:
        OSError: there is no such file, it is no GGUF file, or it is damaged or truncated.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_START.size)
        if start[:4] != b"GGUF":
            raise OSError(f"{path} is not a GGUF file: it begins with {start[:4]!r}. Export the model again.")
        if len(start) < _START.size:
            raise _damaged(path, f"it ends after {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()


def _damaged(path: Path, why: str) -> OSError:
    return OSError(f"{path} is damaged: {why}. Copy it again, or export the model again.")


class _Reader:
    """Reads one value after the other, and nothing behind the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._size, self._at = path, data, len(data), 0

    def header(self) -> GgufHeader:
        _, version, tensors, fields = self._take(_START)
        if version not in (2, 3):
            raise OSError(f"{self._path} has version {version} of GGUF; expected 2 or 3. Export the model again.")
        for name, count in (("fields", fields), ("tensors", tensors)):
            if count > MAX_ENTRIES:
                raise self._wrong(f"it has {count:,} {name}; expected at most {MAX_ENTRIES:,}")
        header = GgufHeader(self._path)
        for _ in range(fields):
            key = self._name(header.metadata, "field")
            (kind,) = self._take(struct.Struct("<I"))
            header.metadata[key] = self._array(key) if kind == _ARRAY else self._value(key, kind)
        described = [self._described(index) for index in range(tensors)]
        self._place(header, described)
        return header

    def _take(self, form: struct.Struct) -> tuple[Any, ...]:
        self._need(form.size)
        values = form.unpack_from(self._data, self._at)
        self._at += form.size
        return values

    def _need(self, count: int) -> None:
        if count > self._size - self._at:
            raise self._wrong(f"its header is longer than its {self._size:,} bytes")

    def _wrong(self, why: str) -> OSError:
        return _damaged(self._path, why)

    def _text(self, longest: int) -> str:
        (length,) = self._take(struct.Struct("<Q"))
        if length > longest:
            raise self._wrong(f"a string at byte {self._at:,} has {length:,} bytes; expected at most {longest:,}")
        self._need(length)
        text = self._data[self._at : self._at + length]
        self._at += length
        return text.decode("utf-8", "replace")

    def _name(self, known: dict[str, Any], what: str) -> str:
        name = self._text(MAX_KEY)
        if name in known or not name:
            raise self._wrong(f"the {what} {name!r} {'occurs twice' if name else 'has no name'}")
        return name

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._text(MAX_VALUE)
        if kind not in _SCALARS:
            raise self._wrong(f"the field {key!r} has the unknown type {kind}")
        return self._take(struct.Struct(f"<{_SCALARS[kind]}"))[0]

    def _array(self, key: str) -> GgufArray:
        """Skip the values of an array."""
        kind, length = self._take(struct.Struct("<IQ"))
        if kind in _SCALARS:
            size = length * struct.calcsize(f"<{_SCALARS[kind]}")
            self._need(size)
            self._at += size
        elif kind == _STRING:
            self._need(8 * length)  # so that the loop is not longer than the file
            data, size, at, unpack = self._data, self._size, self._at, struct.Struct("<Q").unpack_from
            for _ in range(length):
                if at + 8 > size:
                    break
                at += 8 + unpack(data, at)[0]
            self._need(at - self._at)
            self._at = at
        else:
            raise self._wrong(f"the array {key!r} has values of the unknown type {kind}")
        return GgufArray(kind, length)

    def _described(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape, type and offset of the next tensor."""
        name = self._text(MAX_KEY)
        (dimensions,) = self._take(struct.Struct("<I"))
        if not 1 <= dimensions <= 4:
            raise self._wrong(f"the tensor {name!r} has {dimensions} dimensions; expected 1 to 4")
        shape = self._take(struct.Struct(f"<{dimensions}Q"))
        kind, offset = self._take(struct.Struct("<IQ"))
        if kind not in _BLOCKS:
            raise self._wrong(f"the tensor {name!r} has the unknown type {kind}")
        if shape[0] % _BLOCKS[kind][0] or 0 in shape:
            raise self._wrong(f"the tensor {name!r} has the shape {shape}, which its type {kind} does not allow")
        return name, shape, kind, offset

    def _place(self, header: GgufHeader, described: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        """Add the tensors to a header; each begins where the one before ends, aligned."""
        alignment = header.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._wrong(f"general.alignment is {alignment!r}; expected a power of 2")
        first = math.ceil(self._at / alignment) * alignment
        end = 0
        for name, shape, kind, offset in described:
            if name in header.tensors:
                raise self._wrong(f"the tensor {name!r} occurs twice")
            if offset != (expected := math.ceil(end / alignment) * alignment):
                raise self._wrong(f"the tensor {name!r} has the offset {offset:,}; expected {expected:,}")
            elements, size = _BLOCKS[kind]
            nbytes = math.prod(shape) // elements * size
            header.tensors[name] = GgufTensor(shape, kind, first + offset, nbytes)
            end = offset + nbytes
        if first + end > self._size:
            raise self._wrong(f"it has {self._size:,} bytes, but its tensors end at byte {first + end:,}")
