# SPDX-License-Identifier: Apache-2.0
"""A drawn test image, always the same, that costs as much to decode and resize as a photograph."""

import io

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["PHOTO_SIZE", "make_photo", "photo_jpeg"]

PHOTO_SIZE = (4000, 3000)
"""Width and height, in pixels, of a camera's 12 megapixels."""

_JPEG_QUALITY = 92
_SHAPES = 400


def make_photo(width: int = PHOTO_SIZE[0], height: int = PHOTO_SIZE[1], seed: int = 0) -> Image.Image:
    """Return an RGB image with features of a photograph: shading, sharp edges, textures and sensor noise.

    Args:
        width, height: in pixels, at least 1.
        seed: the same seed and size give the same pixels.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    # Light and dark areas: a few random values, enlarged smoothly.
    coarse = Image.fromarray(random.integers(40, 216, (12, 16, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(_SHAPES):
        x, y = random.integers(0, (width, height))
        w, h = (random.integers(1, 2 + side // 12) for side in (width, height))
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        box = (int(x), int(y), int(x + w), int(y + h))
        kind = int(random.integers(3))
        if kind == 0:
            draw.rectangle(box, fill=colour)
        elif kind == 1:
            draw.ellipse(box, fill=colour)
        else:
            draw.line(box, fill=colour, width=1 + width // 1000)
    pixels = np.asarray(image)
    # Noise for each pixel, equal in the three channels, like a camera's luminance noise.
    grain = random.integers(-12, 13, (height, width, 1), dtype=np.int16)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def photo_jpeg(width: int = PHOTO_SIZE[0], height: int = PHOTO_SIZE[1], seed: int = 0) -> bytes:
    """Return `make_photo` as the bytes of a JPEG file, with a camera's quality and colour subsampling (4:2:0)."""
    file = io.BytesIO()
    make_photo(width, height, seed).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling="4:2:0")
    return file.getvalue()
