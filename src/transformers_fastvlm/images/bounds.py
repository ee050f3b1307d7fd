# SPDX-License-Identifier: Apache-2.0
"""Bounds on the cost of decoding an image, checked in the file's bytes before they reach a decoder.

The number of pixels bounds most of the time and memory. This module also bounds the rest: many scans over the same
pixels, many small parts that Pillow handles one by one in Python, and formats that it decodes in Python.
"""

import re
import struct
from collections.abc import Callable
from typing import Any

from PIL import Image

__all__ = ["MAX_FILE_BYTES", "MAX_SCANS", "MAX_SIDE", "TooManyPixels", "check_dimensions", "check_file"]

MAX_SIDE = 2**20
"""Maximum side of an image, in pixels."""

MAX_FILE_BYTES = 2**30
MAX_SCANS = 100
"""Maximum scans of a JPEG; encoders write about 10. Each may take as long as decoding all pixels."""

_SCANNED_PIXELS = 2 * 10**9  # of all scans of a JPEG together
_FEW_SCANS = 20
MAX_PIECES = 2**17  # chunks of a PNG, strips or tiles of a TIFF, blocks of a GIF
_MAX_SEGMENTS = 2**10  # metadata of a JPEG or a GIF, which Pillow joins in quadratic time
_MAX_METADATA_BLOCKS = 2**13  # of a GIF, likewise; up to 255 bytes each
_MAX_JUNK = 2**20
_MAX_SLOW_BYTES = 2**23  # formats that Pillow decodes in Python, at 2 to 8 MB per second
_MAX_PPM_HEADER = 2**16
_MAX_JPEG2000_BYTES = 2**25


class TooManyPixels(ValueError):
    """An image with more pixels than the limit."""


def check_dimensions(width: int, height: int, what: str = "the image", max_pixels: int | None = None) -> None:
    """Raise ValueError if an image of this width and height, called `what`, is too large to be decoded and resized.

    The limit of pixels is `max_pixels`, or `PIL.Image.MAX_IMAGE_PIXELS` if that is None; Pillow itself only warns
    above the latter.
    """
    if width < 1 or height < 1:
        raise ValueError(f"{what} is {width}x{height} pixels (width x height); both sides must be at least 1.")
    if max(width, height) > MAX_SIDE:
        raise ValueError(
            f"{what} is {width}x{height} pixels (width x height); sides up to {MAX_SIDE} are supported. "
            "Cut it into tiles first."
        )
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    if limit is not None and width * height > limit:
        raise TooManyPixels(
            f"{what} is {width}x{height} = {width * height} pixels, more than the limit of {limit} against "
            "decompression bombs. If you trust the source, raise max_pixels (--max-pixels) or "
            "PIL.Image.MAX_IMAGE_PIXELS, or shrink the image first."
        )


def check_file(file: Any, what: str, max_pixels: int | None = None) -> None:
    """Raise ValueError if decoding a file would cost far more than its pixels do. The file's position is kept.

    Args:
        file: a binary, seekable file.
        what: its name in errors.
        max_pixels: see `check_dimensions`; also the limit for a TIFF tile, and half of it for JPEG 2000, which takes
            twice the memory.

    Raises:
        ValueError: the file has too many bytes or parts; the message names them.
    """
    position = file.tell()
    try:
        size = file.seek(0, 2)
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{what} has {size} bytes; images up to {MAX_FILE_BYTES} bytes are read. Shrink it first.")
        file.seek(0)
        head = file.read(12)
        check = next((check for beginning, check in _CHECKS if head.startswith(beginning)), None)
        if check is not None:
            file.seek(0)
            limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
            try:
                problem = check(file, size, limit)
            except (struct.error, IndexError, EOFError):
                return  # cut off or damaged: the decoder's error is better
            if problem:
                raise ValueError(f"{what} {problem} Save it again with another program if you trust it.")
    finally:
        file.seek(position)


# JPEG

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither a stuffed byte, a restart marker nor fill
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_ALONE = (0x01, *range(0xD0, 0xD9))
_ALONE_FOR_PILLOW = (*_ALONE, 0xC8, 0xD9, *range(0xF0, 0xFE))
_SCAN, _END = 0xDA, 0xD9


def _jpeg(file: Any, size: int, limit: int | None) -> str | None:
    pixels = segments = junk = 0
    before = b""
    while byte := file.read(1):  # up to the first scan, as Pillow reads it
        if before != b"\xff" or byte in (b"\0", b"\xff"):
            before, junk = byte, junk + 1
            if junk > _MAX_JUNK:
                return f"has over {_MAX_JUNK} bytes between its segments."
            continue
        before, segments = b"", segments + 1
        if segments > _MAX_SEGMENTS:
            return f"has over {_MAX_SEGMENTS} segments of metadata."
        if byte[0] == _SCAN:
            break
        if byte[0] in _ALONE_FOR_PILLOW:
            continue
        (length,) = struct.unpack(">H", file.read(2))
        if byte[0] in _FRAMES:
            _, height, width = struct.unpack(">BHH", file.read(5))
            pixels = max(pixels, height * width)
            length -= 5
        file.seek(max(0, length - 2), 1)
    most = min(MAX_SCANS, max(_FEW_SCANS, _SCANNED_PIXELS // max(1, pixels)))
    file.seek(0)
    if _count(file, b"\xff\xda") <= most:
        return None  # an upper bound: it also counts markers in metadata and after the image
    file.seek(0)
    scans = _scans(file.read(), most)
    return f"has over {most} scans, where about 10 are usual." if scans > most else None


def _count(file: Any, pair: bytes) -> int:
    """Return how often two bytes occur."""
    found, before = 0, b""
    while block := file.read(2**20):
        found += (before + block).count(pair)
        before = block[-1:]
    return found


def _scans(content: bytes, most: int) -> int:
    """Return the number of scans of a JPEG up to its end, at most `most` + 1; markers are found as by libjpeg."""
    scans, place = 0, 2
    while scans <= most and (found := _MARKER.search(content, place)):
        marker, place = content[found.end() - 1], found.end()
        if marker == _END:
            break
        scans += marker == _SCAN
        if marker not in _ALONE:
            place += max(2, int.from_bytes(content[place : place + 2], "big"))
    return scans


# The others


def _png(file: Any, size: int, limit: int | None) -> str | None:
    file.seek(8)
    for _ in range(MAX_PIECES):
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind == b"IEND":
            return None
        file.seek(length + 4, 1)
    return f"has over {MAX_PIECES} chunks."


def _gif(file: Any, size: int, limit: int | None) -> str | None:
    """Read the blocks up to the second image, as Pillow does to find out whether the GIF is animated."""
    flags = file.read(13)[10]
    file.seek(3 << (flags & 7) + 1 if flags & 128 else 0, 1)
    images, extensions, blocks = 0, 0, {b",": 0, b"!": 0}
    while images < 2 and (kind := file.read(1)) not in (b"", b";"):
        if kind not in blocks:
            extensions += 1  # Pillow skips one byte
        elif kind == b",":
            images += 1
            flags = file.read(9)[8]
            file.seek((3 << (flags & 7) + 1 if flags & 128 else 0) + 1, 1)
        else:
            extensions += 1
            file.seek(1, 1)
        while kind in blocks and (length := file.read(1)[0]):
            file.seek(length, 1)
            blocks[kind] += 1
            if blocks[b","] > 8 * MAX_PIECES or blocks[b"!"] > _MAX_METADATA_BLOCKS:
                return f"has over {blocks[kind] - 1} blocks of {'pixels' if kind == b',' else 'metadata'}."
        if extensions > _MAX_SEGMENTS:
            return f"has over {_MAX_SEGMENTS} blocks of metadata."
    return None


def _bmp(file: Any, size: int, limit: int | None) -> str | None:
    header = file.read(34)
    compressed = struct.unpack("<I", header[30:34])[0] in (1, 2)
    if compressed and size > _MAX_SLOW_BYTES:
        return f"is a run-length encoded BMP of {size} bytes; up to {_MAX_SLOW_BYTES} are read."
    return None


def _ppm(file: Any, size: int, limit: int | None) -> str | None:
    head = file.read(_MAX_PPM_HEADER)
    fields = re.sub(rb"#[^\r\n]*", b"", head[2:]).split(maxsplit=3)
    if len(fields) < 2:
        return f"has a header of over {_MAX_PPM_HEADER} bytes." if size > len(head) else None
    kind = head[1:2]
    plain = kind in b"123"
    fast = {b"5": (b"255", b"65535"), b"6": (b"255",)}
    slow = plain or (kind in fast and len(fields) > 2 and fields[2] not in fast[kind])
    if slow and size > _MAX_SLOW_BYTES:
        return f"is a PPM in text, or with unusual values, of {size} bytes; up to {_MAX_SLOW_BYTES} are read."
    if plain:
        file.seek(0)
        if file.read().count(b"#") > MAX_SCANS:
            return f"has over {MAX_SCANS} comments."
    return None


_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_BYTES = (1, 2, 6, 7)
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_PLACES = (273, 279, 324, 325)


def _tiff(file: Any, size: int, limit: int | None) -> str | None:
    """Check the tags of the first page: for some tags Pillow creates one Python object per value."""
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = head[2] == 43  # as Pillow checks
    (offset,) = struct.unpack(f"{order}Q", head[8:16]) if big else struct.unpack(f"{order}I", head[4:8])
    if offset >= size:
        return None
    file.seek(offset)
    (entries,) = struct.unpack(f"{order}{'Q' if big else 'H'}", file.read(8 if big else 2))
    if entries > 2**16:
        return f"has {entries} tags."
    tile = {_TILE_WIDTH: 0, _TILE_LENGTH: 0}
    for _ in range(entries):
        tag, kind, count = struct.unpack(f"{order}HH{'Q' if big else 'I'}", file.read(12 if big else 8))
        value = file.read(8 if big else 4)
        if kind not in _TIFF_BYTES and count > MAX_PIECES:
            return f"has {count} {'strips or tiles' if tag in _PLACES else f'values of tag {tag}'}, over {MAX_PIECES}."
        if tag in tile and kind in (3, 4, 16):
            tile[tag] = int.from_bytes(value[: _TIFF_SIZES[kind]], "little" if order == "<" else "big")
    if limit is not None and tile[_TILE_WIDTH] * tile[_TILE_LENGTH] > limit:
        return f"has tiles of {tile[_TILE_WIDTH]}x{tile[_TILE_LENGTH]} pixels, more than the limit of {limit}."
    return None


_SIZ = b"\xff\x4f\xff\x51"


def _jpeg2000(file: Any, size: int, limit: int | None) -> str | None:
    if size > _MAX_JPEG2000_BYTES:
        return f"is a JPEG 2000 of {size} bytes; up to {_MAX_JPEG2000_BYTES} are read."
    head = file.read(2**16)
    place = head.find(_SIZ)
    if place < 0 or limit is None:
        return None
    right, bottom, left, top = struct.unpack(">4I", head[place + 8 : place + 24])
    if (right - left) * (bottom - top) > limit // 2:
        return f"is a JPEG 2000 of {(right - left) * (bottom - top)} pixels; up to {limit // 2} are read."
    return None


_CHECKS: tuple[tuple[bytes, Callable[[Any, int, int | None], str | None]], ...] = (
    (b"\xff\xd8\xff", _jpeg),
    (b"\x89PNG", _png),
    (b"GIF8", _gif),
    (b"BM", _bmp),
    *((b"P%c" % digit, _ppm) for digit in b"123456fy"),
    *((start, _tiff) for start in (b"II", b"MM")),
    (_SIZ, _jpeg2000),
    (b"\x00\x00\x00\x0cjP  ", _jpeg2000),
)
