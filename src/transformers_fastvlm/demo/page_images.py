# SPDX-License-Identifier: Apache-2.0
"""Images of visitors: decode, check and rotate them as a browser does, and make thumbnails."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..data.image_files import ImageFolder
from ..data.sample_errors import SampleError
from ..images.read_options import WHITE, ReadOptions
from ..images.reading import as_shown, pil_to_rgb, read_image
from .answering import UnusableInput

__all__ = ["MAX_IMAGES", "MAX_PIXELS", "MAX_UPLOAD_BYTES", "read_frame", "read_images", "save_small"]

MAX_UPLOAD_BYTES = 32 * 2**20
MAX_IMAGES = 8
MAX_PIXELS = 64_000_000
"""Maximum total pixels of a conversation's images."""

MAX_FRAME_CHARACTERS = 16 * 2**20
_SHOWN_SIDE = 768


def read_images(files: Sequence[str]) -> list[Image.Image]:
    """Return uploaded images, decoded and rotated by their EXIF orientation, as a browser shows them.

    Raises:
        UnusableInput: too many or too large, or one that cannot be read.
    """
    if len(files) > MAX_IMAGES:
        raise UnusableInput(f"{len(files)} images are too many at once; send up to {MAX_IMAGES}.")
    images: list[Image.Image] = []
    pixels = 0
    for file in files:
        path = Path(file)
        try:
            image = ImageFolder(path.parent).open(path.name)
        except (SampleError, NotADirectoryError) as error:
            reason = str(error)
            raise UnusableInput(f"{reason[:1].upper()}{reason[1:]}") from error
        pixels += image.width * image.height
        if pixels > MAX_PIXELS:
            raise UnusableInput(
                f"The images have {pixels / 1e6:.0f} million pixels together; up to {MAX_PIXELS / 1e6:.0f} million "
                "fit into a conversation. Send fewer, or smaller ones."
            )
        images.append(image)
    return images


def read_frame(frame: object) -> Image.Image:
    """Return a frame of the camera, which comes as a data URI.

    Raises:
        UnusableInput: anything else, or an image that cannot be read.
    """
    url = frame.get("url") if isinstance(frame, dict) else None
    if not isinstance(url, str) or not url.startswith("data:image/"):
        raise UnusableInput("The camera sent no image. Stop it and start it again.")
    if len(url) > MAX_FRAME_CHARACTERS:
        raise UnusableInput("The camera's images are too large. Choose a smaller resolution in its settings.")
    try:
        image = as_shown(read_image(url), ReadOptions())
    except ValueError as error:
        raise UnusableInput(f"An image of the camera cannot be read: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise UnusableInput(f"The camera's images are too large: {image.width} x {image.height} pixels.")
    return image


def save_small(image: Image.Image, folder: Path) -> Path:
    """Write a thumbnail in a format that any browser can show, and return its path."""
    try:
        small = pil_to_rgb(image, WHITE).copy()
    except ValueError as error:
        raise UnusableInput(f"An image cannot be used: {error}") from error
    small.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    path = folder / f"{hashlib.sha256(small.tobytes()).hexdigest()[:24]}.jpg"
    if not path.exists():
        small.save(path, quality=88)
    return path
