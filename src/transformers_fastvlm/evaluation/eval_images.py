# SPDX-License-Identifier: Apache-2.0
"""Small copies of the pictures of an evaluation, for its page."""

from pathlib import Path

from PIL import Image

from ..images.reading import pil_to_rgb
from ..storage.atomic_files import replacing

__all__ = ["LARGEST_SIDE", "save_small"]

LARGEST_SIDE = 512


def save_small(picture: Image.Image, path: Path) -> None:
    """Write a picture as JPEG, at most `LARGEST_SIDE` pixels wide and high.

    Args:
        picture: decoded; it is not changed.
        path: of the file; its folder is made. It is there whole or not at all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    small = pil_to_rgb(picture).copy()
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    with replacing(path, sync=False) as file:
        small.save(file, "JPEG", quality=85)
