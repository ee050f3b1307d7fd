# SPDX-License-Identifier: Apache-2.0
"""Decoding image files of the supported formats, within bounds and upright, or with a clear error.

All code of the package opens image files through this module, so that the same files are accepted and refused
everywhere. Of an animated image or several pages, the first frame or page is used.
"""

import errno
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from .bounds import check_dimensions, check_file
from .formats import describe, image_formats

__all__ = [
    "FIRST_OF_SEVERAL",
    "is_machine_fault",
    "load_pixels",
    "load_stored",
    "open_image",
    "oriented",
    "read_stored",
    "stands_on_its_side",
]

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
# Pillow decodes these in one step: `tile` does not show whether there is something left to decode.
_WITHOUT_TILES = ("WEBP", "AVIF", "HEIF")
_QUARTER_TURNS = (5, 6, 7, 8)


_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, getattr(errno, "ESTALE", errno.EIO))
_HEAD = 4096

FIRST_OF_SEVERAL = "first_of_several"
"""Key in an image's `info`, set if it is the first frame or page of several."""

_DAMAGED_TAGS = ("Truncated", "Skipping tag", "offset too large")


class _Reading(threading.local):
    """State of the warning filter in this thread.

    Attributes:
        depth: number of active `quiet` blocks.
        message: text of the warning that Python is matching.
        heard: messages of Pillow's warnings in the innermost `quiet`.
    """

    depth = 0
    message = ""
    heard: list[str] = []


_reading = _Reading()


class _Messages:
    """A warning filter's pattern for messages, which Python matches first: any message in threads that read."""

    pattern = "(?!)"  # for code that copies filters to other threads, such as scikit-learn: the copy matches nothing

    def match(self, message: str) -> bool:
        _reading.message = message
        return _reading.depth > 0


class _Modules:
    """A warning filter's pattern for modules, which Python matches next: those of Pillow."""

    pattern = "(?!)"

    def match(self, module: str) -> bool:
        found = module.partition(".")[0] == "PIL"
        if found:
            _reading.heard.append(_reading.message)
        return found


_FILTER: Any = ("ignore", _Messages(), Warning, _Modules(), 0)


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Suppress Pillow's warnings while this thread reads an image; yield the list of their messages.

    `warnings.catch_warnings` would change the filters of other threads and undo their changes. This filter matches
    only Pillow's warnings, and only in this thread.
    """
    filters: Any = warnings.filters
    if not filters or filters[0] is not _FILTER:
        filters.insert(0, _FILTER)
    before, _reading.heard = _reading.heard, []
    _reading.depth += 1
    try:
        yield _reading.heard
    finally:
        _reading.depth -= 1
        _reading.heard = before


def is_machine_fault(error: BaseException) -> bool:
    """Return whether the machine, not an image, caused an error: no memory, no file handles, a failing disk.

    Such an error ends a run, while an image's error concerns only this image.
    """
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _MACHINE)


@contextmanager
def _errors_of(what: str, how: str) -> Iterator[None]:
    """Turn any error of Pillow's about an image into a ValueError with the image's name."""
    try:
        yield
    except Exception as error:  # plugins raise OSError, SyntaxError, ValueError, EOFError, struct.error and more
        if is_machine_fault(error):
            raise
        if isinstance(error, OSError) and str(error).startswith("out of memory"):  # Pillow's wording
            raise MemoryError(f"{what}: {error}") from error
        if isinstance(error, Image.DecompressionBombError):
            raise ValueError(
                f"{what} is too large: {error} Raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
            ) from error
        reason = str(error) if isinstance(error, OSError | ValueError | SyntaxError) and str(error) else repr(error)
        raise ValueError(f"{what} {how}: {reason.rstrip('.')}.") from error


def open_image(file: Any, what: str, max_pixels: int | None = None) -> Image.Image:
    """Return the image in a file; only its header is decoded.

    Args:
        file: a binary, seekable file. It must stay open until the image is loaded.
        what: its name in errors.
        max_pixels: see `check_dimensions`.

    Raises:
        ValueError: the file is empty, damaged, too large, or has an unsupported format.
        OSError, MemoryError: a fault of the machine; see `is_machine_fault`.
    """
    with _errors_of(what, "cannot be read"):
        file.seek(0)
        head = file.read(_HEAD)
    if not head:
        raise ValueError(f"{what} is empty (0 bytes).")
    check_file(file, what, max_pixels)
    with _errors_of(what, "is damaged"), quiet() as warned:
        image = _opened(file, head)
    if image is None:
        known = describe(head)
        raise ValueError(
            f"{what} {known}"
            if known
            else f"{what} is not an image of a supported format ({', '.join(image_formats())}), or it is damaged."
        )
    check_dimensions(*image.size, what, max_pixels)
    if image.format == "TIFF" and (said := [text for text in warned if any(part in text for part in _DAMAGED_TAGS)]):
        raise ValueError(f"{what} is damaged: {' '.join(said[0].split())}.")
    if _has_several(image):
        image.info[FIRST_OF_SEVERAL] = True
    return image


def _has_several(image: Image.Image) -> bool:
    """Return whether an image is animated or has several pages; extra images in a phone's JPEG (MPO) do not count."""
    try:
        with quiet():
            return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # for GIF, Pillow reads the second frame; its damage does not matter here
        return False


def _opened(file: Any, head: bytes) -> Image.Image | None:
    """Return an image whose header was read, of any number of pixels; None if its format is not supported."""
    formats = image_formats()
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError:
        # More than twice Pillow's limit, which is global; the caller's limit is checked next.
        for format in formats:
            make, accepts = Image.OPEN[format]
            if accepts is None or accepts(head[:16]) is True:
                file.seek(0)
                return make(file, "")
        raise


def load_pixels(image: Image.Image, what: str = "the image", max_pixels: int | None = None) -> Image.Image:
    """Check the bounds of an opened Pillow image and decode its pixels, which detects a truncated file.

    16-bit gray values, which Pillow reads from PGM in mode I, become mode I;16.

    Raises:
        ValueError: the image is too large, truncated or damaged.
        OSError, MemoryError: a fault of the machine; see `is_machine_fault`.
    """
    if not isinstance(image, ImageFile.ImageFile) or not (
        image.tile or (image.format in _WITHOUT_TILES and image.fp is not None)
    ):
        check_dimensions(*image.size, what, sys.maxsize)  # already decoded: only the sides are checked
        return image
    check_dimensions(*image.size, what, max_pixels)
    if (file := image.fp) is not None:
        with _errors_of(what, "cannot be read"):
            seekable = file.seekable()
        if seekable:
            check_file(file, what, max_pixels)
    with _errors_of(what, "is truncated or damaged"), quiet():
        image.load()
    check_dimensions(*image.size, what, max_pixels)
    return image.convert("I;16") if image.mode == "I" and image.format == "PPM" else image


def load_stored(image: Image.Image, what: str, max_pixels: int | None = None) -> Image.Image:
    """Decode a newly opened image; return the pixels as stored, with the orientation in its EXIF.

    Pillow applies the orientation of a TIFF while decoding it and drops the tag. Both are undone here, so that all
    formats behave the same.

    Raises:
        ValueError, OSError, MemoryError: see `load_pixels`.
    """
    # Some other formats have their orientation only after decoding.
    stated = orientation_of(image) if image.format == "TIFF" else 1
    image = load_pixels(image, what, max_pixels)
    if stated == 1 or orientation_of(image) != 1:
        return image
    image = image.transpose(_BACK[stated])
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = stated
    image.info["exif"] = exif.tobytes()  # copies of the image read it from there
    return image


def read_stored(file: Any, what: str, max_pixels: int | None = None) -> Image.Image:
    """Return the decoded image in a file, as `load_stored` does; the file can be closed afterwards.

    Raises:
        ValueError, OSError, MemoryError: see `open_image` and `load_pixels`.
    """
    with open_image(file, what, max_pixels) as image:
        return load_stored(image, what, max_pixels)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if there is no EXIF or it cannot be read."""
    try:
        with quiet():
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block raises struct.error, SyntaxError, ValueError and more
        return 1
    return orientation if orientation in _BACK else 1


def oriented(image: Image.Image, do_exif_transpose: bool | None) -> Image.Image:
    """Return a decoded image with its EXIF orientation applied, or with its pixels as stored.

    Either way the result has no orientation, so it is not applied twice. An unreadable EXIF block is ignored, as in
    viewers. An image without orientation is returned unchanged.
    """
    orientation = orientation_of(image)
    if orientation == 1:
        return image
    upright = ImageOps.exif_transpose(image)
    return upright if do_exif_transpose else upright.transpose(_BACK[orientation])


def stands_on_its_side(image: Image.Image) -> bool:
    """Whether a decoded image's EXIF orientation swaps its width and height."""
    return orientation_of(image) in _QUARTER_TURNS
