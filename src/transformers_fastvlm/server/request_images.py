# SPDX-License-Identifier: Apache-2.0
"""Images of a request: from data: URLs or fetched bytes to pixels, within limits.

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
from .protocol import ImageUrl

__all__ = ["data_of", "decode", "is_remote"]


def refused(image_url: ImageUrl, message: str, code: str = "invalid_image") -> ApiError:
    """Return the error for an image that cannot be used."""
    return ApiError(400, f"{image_url.param}: {message}", param=image_url.param, code=code)


def is_remote(image_url: ImageUrl) -> bool:
    """Return whether an image has an http(s) URL."""
    return image_url.url[:8].lower().startswith(("http://", "https://"))


def data_of(image_url: ImageUrl) -> bytes:
    """Return the bytes of an image in a data: URL.

    Raises:
        ApiError: another kind of URL, or not base64.
    """
    if not is_data_url(image_url.url):
        shown = image_url.url[:40] + "..." * (len(image_url.url) > 40)
        raise refused(
            image_url, f"{shown!r} is not a URL of an image; expected data:image/...;base64,... Files are never read."
        )
    try:
        data = from_base64(image_url.url)
    except ValueError as error:
        raise refused(image_url, f"the base64 of the image is broken: {error}.") from error
    if not data:
        raise refused(image_url, "the image is empty (0 bytes).")
    return data


def decode(
    image_urls: Sequence[ImageUrl],
    contents: Sequence[bytes],
    options: ReadOptions,
    check: Callable[[], None],
) -> list[Any]:
    """Return the decoded images of a request.

    Args:
        image_urls, contents: the origin and the bytes of each image.
        options: options for reading. `max_pixels` limits all images together, and is checked before any is decoded.
        check: called before each image is decoded; raises if the work should end.

    Raises:
        ApiError: not an image, damaged, animated, or too many pixels.
    """
    opened = [
        _open(image_url, content, options.max_pixels) for image_url, content in zip(image_urls, contents, strict=True)
    ]
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
    for image_url, image in zip(image_urls, opened, strict=True):
        check()
        loaded.append(_load(image_url, image, options))
    return loaded


def _open(image_url: ImageUrl, content: bytes, max_pixels: int | None) -> Image.Image:
    try:
        return open_image(io.BytesIO(content), "the image", max_pixels)
    except TooManyPixels as error:
        message = f"the image has too many pixels; this server accepts {max_pixels} per request. Shrink it."
        raise refused(image_url, message, "image_too_large") from error
    except ValueError as error:
        raise refused(image_url, str(error)) from error


def _load(image_url: ImageUrl, image: Image.Image, options: ReadOptions) -> Image.Image:
    try:
        with image:
            # Copy only the pixels: an opened image would also keep its file in memory.
            return pil_to_rgb(as_shown(load_stored(image, "the image", options.max_pixels), options))
    except ValueError as error:
        raise refused(image_url, str(error)) from error
