# SPDX-License-Identifier: Apache-2.0
"""Images named on the command line: files, http(s) URLs, or "-" for standard input."""

import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .cli_errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..images.read_options import ReadOptions

__all__ = ["STDIN", "question", "read_named_image", "read_images"]

STDIN = "-"


def read_images(names: Sequence[str], options: "ReadOptions | None" = None) -> "list[Image]":
    """Read every image; see `read_named_image`.

    Raises:
        UserError: standard input is named more than once.
    """
    if list(names).count(STDIN) > 1:
        raise UserError(f"{STDIN!r} is given more than once, but standard input holds one image. Give files instead.")
    return [read_named_image(name, options) for name in names]


def read_named_image(name: str, options: "ReadOptions | None" = None) -> "Image":
    """Return a decoded image.

    Args:
        name: path, http(s) URL, or "-" for standard input.
        options: options for reading; None for the defaults.

    Raises:
        UserError: there is no such file.
        ValueError, ConnectionError: it is not an image, or cannot be downloaded.
    """
    from ..images.read_options import ReadOptions
    from ..images.reading import as_shown, read_image

    options = options or ReadOptions()

    if name == STDIN:
        image = _from_stdin(options.max_pixels)
    elif not name.startswith(("http://", "https://")) and not os.path.exists(name):
        raise UserError(f"no such file: {name!r}. Expected an image's path, its http:// or https:// URL, or '-'.")
    else:
        image = read_image(name, options.max_pixels)
    return as_shown(image, options)


def _from_stdin(max_pixels: int | None) -> "Image":
    from ..images.decoding import read_stored

    content = sys.stdin.buffer.read()
    if not content:
        raise UserError("standard input is empty; expected an image, as in: fastvlm generate - -p '…' < photo.jpg")
    return read_stored(io.BytesIO(content), "the image on standard input", max_pixels)


def question(text: str, images: "Sequence[Image]") -> list[dict[str, Any]]:
    """Return the parts of a user's message; see `place_images`.

    Raises:
        UserError: the text has <image>, but not once for each image.
    """
    from ..engines.prompts import place_images

    try:
        return place_images(text, images)
    except ValueError as error:
        raise UserError(str(error)) from error
