# SPDX-License-Identifier: Apache-2.0
"""Tests of transparent images: laid on a colour by every way in, or with their bits as the reference takes them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ways_in import WAYS

from transformers_fastvlm import FastVLMImageProcessor, FastVLMImageProcessorPil
from transformers_fastvlm.batch.sources import SourceOptions
from transformers_fastvlm.images.read_options import ReadOptions, as_colour
from transformers_fastvlm.images.reading import as_shown, opaque
from transformers_fastvlm.server import Settings

WHITE = (255, 255, 255)


def square(mode: str) -> Image.Image:
    """A black square on clear ground, of 64x64 pixels, whose hidden colour is black too."""
    image = Image.new("RGBA", (64, 64))
    image.paste((0, 0, 0, 255), (16, 16, 48, 48))
    if mode == "P":  # with one value that is transparent
        image = Image.new("P", (64, 64), 1)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.paste(0, (16, 16, 48, 48))
        image.info["transparency"] = 1
    elif mode == "P of bytes":
        image = square("P")
        image.info["transparency"] = b"\xff\0"
    elif mode in ("L", "RGB"):
        shown = Image.new(mode, (64, 64), 9 if mode == "L" else (9, 9, 9))
        shown.paste(0, (16, 16, 48, 48))
        shown.info["transparency"] = 9 if mode == "L" else (9, 9, 9)
        image = shown
    elif mode == "I;16":
        values = np.full((64, 64), 700, np.uint16)
        values[16:48, 16:48] = 0
        image = Image.fromarray(values)
        image.info["transparency"] = 700
    elif mode == "La":
        image = image.convert("LA").convert("La")
    elif mode == "PA":
        alpha = image.getchannel("A")
        image = Image.new("P", (64, 64))
        image.putpalette([0, 0, 0])
        image.putalpha(alpha)
    elif mode != "RGBA":
        image = image.convert(mode)
    return image


MODES = ("RGBA", "RGBa", "LA", "La", "PA", "P", "P of bytes", "L", "RGB", "I;16")
EXPECTED = np.full((64, 64, 3), 255, np.uint8)
EXPECTED[16:48, 16:48] = 0


@pytest.mark.parametrize("kind", [FastVLMImageProcessorPil, FastVLMImageProcessor])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_laid_on_white(mode: str, kind: Any) -> None:
    pixels = kind(size=64)(square(mode), return_tensors="np").pixel_values[0]
    assert np.array_equal(np.moveaxis(pixels * 255, 0, -1), EXPECTED)


@pytest.mark.parametrize("way", WAYS)
def test_by_every_way_in(way: str, tmp_path: Path) -> None:
    for format, mode in (("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("WEBP", "RGBA"), ("TIFF", "RGBA")):
        file = io.BytesIO()
        square(mode).save(file, format, **({"lossless": True} if format == "WEBP" else {}))
        path = tmp_path / f"a.{format.lower()}"
        path.write_bytes(file.getvalue())
        found = WAYS[way](path, file.getvalue(), True)
        if way == "reader":  # which returns what the file holds
            found = as_shown(found, ReadOptions())
        found = found.convert("RGB") if isinstance(found, Image.Image) else found
        assert np.array_equal(np.asarray(found), EXPECTED), (format, mode)


@pytest.mark.parametrize("kind", [FastVLMImageProcessorPil, FastVLMImageProcessor])
def test_arrays_and_tensors_are_blended_as_pillow_blends(kind: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    background = (10, 200, 255)
    expected = np.moveaxis(np.asarray(opaque(Image.fromarray(pixels, "RGBA"), background)), -1, 0)
    processor = kind(size=64, alpha_background=background)
    for image in (pixels, np.moveaxis(pixels, -1, 0), torch.from_numpy(pixels), pixels / 255):
        found = processor(image, return_tensors="np").pixel_values[0] * 255
        assert np.array_equal(found.round(), expected)
    dropped = processor(pixels, alpha_background=None, return_tensors="np").pixel_values[0] * 255
    assert np.array_equal(dropped.round(), np.moveaxis(pixels[..., :3], -1, 0))


@pytest.mark.parametrize("kind", [FastVLMImageProcessorPil, FastVLMImageProcessor])
def test_the_option_is_kept_with_a_checkpoint(kind: Any, tmp_path: Path) -> None:
    hidden = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    for value, expected in (
        (None, [255, 0, 0]),
        ("#102030", [16, 32, 48]),
        ([1, 2, 3], [1, 2, 3]),
        ("none", [255, 0, 0]),
    ):
        kind(size=64, alpha_background=value).save_pretrained(tmp_path)
        processor = kind.from_pretrained(tmp_path)
        pixels = processor(hidden, return_tensors="np").pixel_values[0, :, 5, 5] * 255
        assert pixels.round().tolist() == expected
        pixels = kind(size=64)(hidden, alpha_background=value, return_tensors="np").pixel_values[0, :, 5, 5] * 255
        assert pixels.round().tolist() == expected


def test_opaque_images_are_not_changed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert opaque(image, WHITE) is image
    assert np.array_equal(np.asarray(opaque(image.convert("RGBA"), (1, 2, 3))), pixels)


@pytest.mark.parametrize("colour", ["colour", "#12", (1, 2), (1, 2, 3, 4), (1, 2, 256), (1, 2, 3.5), "#11223344"])
def test_what_is_no_colour(colour: Any) -> None:
    for use in (
        as_colour,
        lambda value: ReadOptions(alpha_background=value),
        lambda value: SourceOptions(prompt="?", alpha_background=value),
        lambda value: Settings(name="m", alpha_background=value),
        lambda value: FastVLMImageProcessorPil(alpha_background=value)(Image.new("RGB", (64, 64))),
    ):
        with pytest.raises(ValueError, match="alpha_background"):
            use(colour)
