# SPDX-License-Identifier: Apache-2.0
"""Pictures of a request: from data: URLs or fetched bytes to pixels, within limits.

Only what a browser shows is taken, and never a path: `file:` and bare names are refused.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from ..images.base64_images import from_base64, is_data_url
from ..images.bounds import TooManyPixels
from ..images.decoding import load_stored, open_image
from ..images.read_options import ReadOptions
from ..images.reading import as_shown, pil_to_rgb
from .api_errors import ApiError
from .protocol import Picture

__all__ = ["data_of", "decode", "is_remote"]


def refused(picture: Picture, message: str, code: str = "invalid_image") -> ApiError:
    """Return the error for an image that cannot be used."""
    return ApiError(400, f"{picture.param}: {message}", param=picture.param, code=code)


def is_remote(picture: Picture) -> bool:
    """Return whether an image has an http(s) address."""
    return picture.url[:8].lower().startswith(("http://", "https://"))


def data_of(picture: Picture) -> bytes:
    """Return the bytes of an image in a data: URL.

    Raises:
        ApiError: another kind of URL, or not base64.
    """
    if not is_data_url(picture.url):
        shown = picture.url[:40] + "..." * (len(picture.url) > 40)
        raise refused(
            picture, f"{shown!r} is not a URL of an image; expected data:image/...;base64,... Files are never read."
        )
    try:
        data = from_base64(picture.url)
    except ValueError as error:
        raise refused(picture, f"the base64 of the image is broken: {error}.") from error
    if not data:
        raise refused(picture, "the image is empty (0 bytes).")
    return data


def decode(
    pictures: Sequence[Picture],
    contents: Sequence[bytes],
    options: ReadOptions,
    check: Callable[[], None],
) -> list[Any]:
    """Return the decoded images of a request.

    Args:
        pictures, contents: the origin and the bytes of each image.
        options: options for reading. `max_pixels` limits all images together, and is checked before any is decoded.
        check: called before each image is decoded; raises if the work should end.

    Raises:
        ApiError: not an image, damaged, animated, or too many pixels.
    """
    opened = [_open(picture, content, options.max_pixels) for picture, content in zip(pictures, contents, strict=True)]
    pixels = sum(image.width * image.height for image in opened)
    if options.max_pixels is not None and pixels > options.max_pixels:
        sizes = ", ".join(f"{image.width}x{image.height}" for image in opened)
        raise ApiError(
            400,
            f"The images ({sizes}) have {pixels} pixels; this server accepts {options.max_pixels} per request. "
            "Shrink them.",
            param="messages",
            code="image_too_large",
        )
    loaded = []
    for picture, image in zip(pictures, opened, strict=True):
        check()
        loaded.append(_load(picture, image, options))
    return loaded


def _open(picture: Picture, content: bytes, max_pixels: int | None) -> Image.Image:
    try:
        return open_image(io.BytesIO(content), "the image", max_pixels)
    except TooManyPixels as error:
        message = f"the image has too many pixels; this server accepts {max_pixels} per request. Shrink it."
        raise refused(picture, message, "image_too_large") from error
    except ValueError as error:
        raise refused(picture, str(error)) from error


def _load(picture: Picture, image: Image.Image, options: ReadOptions) -> Image.Image:
    try:
        with image:
            # Copy only the pixels: an opened image would also keep its file in memory.
            return pil_to_rgb(as_shown(load_stored(image, "the image", options.max_pixels), options))
    except ValueError as error:
        raise refused(picture, str(error)) from error
