# SPDX-License-Identifier: Apache-2.0
"""The drawn picture: always the same, and no easier than a photograph."""

import io

import numpy as np
from PIL import Image

from transformers_fastvlm.bench import make_photo, photo_jpeg


def test_the_same_seed_gives_the_same_pixels() -> None:
    first, again, other = make_photo(160, 120), make_photo(160, 120), make_photo(160, 120, seed=1)
    assert first.size == (160, 120) and first.mode == "RGB"
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_it_is_as_detailed_as_a_photograph() -> None:
    content = photo_jpeg(800, 600)
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "JPEG" and image.size == (800, 600)
        pixels = np.asarray(image.convert("L"), np.float32)
    # A flat picture takes a twentieth of a byte a pixel; cameras' files take a third and more.
    assert len(content) / (800 * 600) > 0.3
    assert pixels.std() > 20 and np.abs(np.diff(pixels)).mean() > 2
