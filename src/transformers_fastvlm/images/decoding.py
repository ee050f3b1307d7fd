# SPDX-License-Identifier: Apache-2.0
"""Decoding image files: within bounds, upright, or a clear error.

Everything in the package that opens an image file does it through here, so that the same files are accepted and
refused everywhere.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import ExifTags, Image, ImageOps

__all__ = ["MAX_SIDE", "check_dimensions", "load_pixels", "load_stored", "oriented", "stands_on_its_side"]

MAX_SIDE = 2**20
"""Longest side, in pixels, of an image that is accepted."""

_Transpose = Image.Transpose
# From an upright image back to the stored one, by EXIF orientation.
_BACK = {
    2: _Transpose.FLIP_LEFT_RIGHT,
    3: _Transpose.ROTATE_180,
    4: _Transpose.FLIP_TOP_BOTTOM,
    5: _Transpose.TRANSPOSE,
    6: _Transpose.ROTATE_90,
    7: _Transpose.TRANSVERSE,
    8: _Transpose.ROTATE_270,
}
_QUARTER_TURNS = (5, 6, 7, 8)


class _PillowWhileReading:
    """In place of a warning filter's pattern for modules: those of Pillow, in the threads that read an image."""

    def __init__(self) -> None:
        self.reading = threading.local()

    def match(self, module: str) -> bool:
        return getattr(self.reading, "depth", 0) > 0 and module.partition(".")[0] == "PIL"


_pillow = _PillowWhileReading()
_FILTER: Any = ("ignore", None, Warning, _pillow, 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what Pillow warns of, always about metadata, from standard error while this thread reads an image.

    `warnings.catch_warnings` changes what other threads see and restores what they have changed. This filter matches
    in no other thread and nothing but Pillow's warnings.
    """
    filters: Any = warnings.filters
    if not filters or filters[0] is not _FILTER:
        filters.insert(0, _FILTER)
    _pillow.reading.depth = getattr(_pillow.reading, "depth", 0) + 1
    try:
        yield
    finally:
        _pillow.reading.depth -= 1


def check_dimensions(width: int, height: int, what: str = "the image") -> None:
    """Raise ValueError unless `what`, an image of this many pixels, may be decoded and resized.

    The number of pixels is limited by `PIL.Image.MAX_IMAGE_PIXELS`, which Pillow itself only warns about.
    """
    if width < 1 or height < 1:
        raise ValueError(f"{what} is {width}x{height} pixels (width x height); both sides must be at least 1.")
    if max(width, height) > MAX_SIDE:
        raise ValueError(
            f"{what} is {width}x{height} pixels (width x height); sides up to {MAX_SIDE} are supported. "
            "Cut it into pieces first."
        )
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{what} is {width}x{height} = {width * height} pixels, more than the limit of {limit} against "
            "decompression bombs. If you trust the source, raise PIL.Image.MAX_IMAGE_PIXELS or shrink the image first."
        )


def load_pixels(image: Image.Image, what: str = "the image") -> Image.Image:
    """Decode a lazily opened Pillow image now, so that a truncated file is noticed; check its size first.

    Raises:
        ValueError: it is too large, truncated or damaged.
    """
    check_dimensions(*image.size, what)
    try:
        with quiet():
            image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and more
        raise ValueError(f"{what} is truncated or damaged: {error}.") from error
    return image


def load_stored(image: Image.Image, what: str) -> Image.Image:
    """Decode an image that was just opened; return the pixels that the file stores, their orientation beside them.

    Pillow turns a TIFF file while it decodes it, and forgets the orientation; both are undone here, so that one rule
    holds for all formats.

    Raises:
        ValueError: see `load_pixels`.
    """
    # Of other formats some say only after decoding what their orientation is.
    stated = orientation_of(image) if image.format == "TIFF" else 1
    image = load_pixels(image, what)
    if stated == 1 or orientation_of(image) != 1:
        return image
    image = image.transpose(_BACK[stated])
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = stated
    image.info["exif"] = exif.tobytes()  # where copies of the image know it from
    return image


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8: that of an upright image where there is no EXIF or it cannot be read."""
    try:
        with quiet():
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block raises struct.error, SyntaxError, ValueError and more
        return 1
    return orientation if orientation in _BACK else 1


def oriented(image: Image.Image, do_exif_transpose: bool | None) -> Image.Image:
    """Return a decoded image turned as its EXIF orientation says, or with its pixels as they are stored.

    Either way the result has no orientation any more, so that nothing turns it a second time. An EXIF block that
    cannot be read turns nothing, as in viewers. An image without orientation is returned as it is.
    """
    orientation = orientation_of(image)
    if orientation == 1:
        return image
    upright = ImageOps.exif_transpose(image)
    return upright if do_exif_transpose else upright.transpose(_BACK[orientation])


def stands_on_its_side(image: Image.Image) -> bool:
    """Whether a decoded image's EXIF orientation swaps its width and height."""
    return orientation_of(image) in _QUARTER_TURNS
