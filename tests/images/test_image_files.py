# SPDX-License-Identifier: Apache-2.0
"""Tests of reading image files, by every way into the package: upright, within bounds, or a clear error."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from ways_in import WAYS, by_processor

from transformers_fastvlm import FastVLMImageProcessor, FastVLMImageProcessorPil
from transformers_fastvlm.cli.cli_images import read_named_image
from transformers_fastvlm.data.image_files import ImageFolder
from transformers_fastvlm.images.decoding import load_stored, oriented
from transformers_fastvlm.images.read_options import ReadOptions

ORIENTATION = 0x0112
TURNED = (*range(2, 9),)


def noise(width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def with_orientation(orientation: int, format: str, **options: Any) -> bytes:
    """Return the file of an image of 24x16 pixels as stored, with an EXIF orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    noise().save(file, format, exif=exif, **options)
    return file.getvalue()


FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 100},
}


def stored_and_upright(content: bytes, orientation: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image's pixels as they are stored and as `ImageOps.exif_transpose` turns them."""
    with Image.open(io.BytesIO(content)) as image:
        turned = ImageOps.exif_transpose(image).convert("RGB")
    plain = turned.copy()
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose
    stored = plain.transpose(Image.Transpose(back[orientation])) if orientation in back else plain
    return np.asarray(stored), np.asarray(turned)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("format", FORMATS)
def test_images_are_upright_by_every_way_in(format: str, way: str, tmp_path: Path) -> None:
    for orientation in (1, *TURNED):
        content = with_orientation(orientation, format, **FORMATS[format])
        path = tmp_path / f"{orientation}.{format.lower()}"
        path.write_bytes(content)
        stored, turned = stored_and_upright(content, orientation)
        assert stored.shape == (16, 24, 3) and turned.shape == ((24, 16, 3) if orientation > 4 else stored.shape)
        for turns, expected in ((True, turned), (False, stored)):
            found = WAYS[way](path, content, turns)
            assert np.array_equal(np.asarray(found), expected), (orientation, turns)


@pytest.mark.parametrize("kind", [FastVLMImageProcessorPil, FastVLMImageProcessor])
@pytest.mark.parametrize("format", FORMATS)
def test_images_of_the_caller_are_turned_too(format: str, kind: Any) -> None:
    for orientation in TURNED:
        content = with_orientation(orientation, format, **FORMATS[format])
        stored, turned = stored_and_upright(content, orientation)
        image = Image.open(io.BytesIO(content))
        read = by_processor(lambda path, content, image=image: image, kind)
        for _ in range(2):  # the caller's image is not changed by it
            assert np.array_equal(np.asarray(read(Path(), content, True)), turned), orientation
        if format != "TIFF":  # which Pillow has turned
            assert np.array_equal(np.asarray(read(Path(), content, False)), stored), orientation
        processor = kind(size=64, image_aspect_ratio="anyres", image_grid_pinpoints=[[64, 128], [128, 64]])
        features = processor(Image.open(io.BytesIO(content)), return_tensors="np")
        assert features.image_sizes.tolist() == [list(turned.shape[:2])]


def test_what_was_turned_is_not_turned_again() -> None:
    for format, options in FORMATS.items():
        for turns in (True, False):
            with Image.open(io.BytesIO(with_orientation(6, format, **options))) as opened:
                image = oriented(load_stored(opened, "the image"), turns)
            for again in (image, image.copy(), image.convert("L"), image.crop((0, 0, 9, 5))):
                assert oriented(again, True).size == again.size


def test_an_orientation_that_cannot_be_read_turns_nothing(tmp_path: Path) -> None:
    content = with_orientation(6, "JPEG")
    at = content.index(b"Exif\0\0") + 6
    for damaged in (b"\xff" * 8, content[at : at + 4] + b"\xff\xff\xff\x7f"):
        path = tmp_path / "damaged.jpg"
        path.write_bytes(content[:at] + damaged + content[at + len(damaged) :])
        assert read_named_image(str(path)).size == (24, 16)
    for value in (0, 9, 2**16 - 1):
        exif = Image.Exif()
        exif[ORIENTATION] = value
        noise().save(tmp_path / "odd.png", exif=exif)
        assert read_named_image(str(tmp_path / "odd.png")).size == (24, 16)


def test_sizes_of_a_data_set_are_those_after_turning(tmp_path: Path) -> None:
    for width, height in ((801, 800), (64, 33)):  # JPEG's size is read from a draft of it
        exif = Image.Exif()
        exif[ORIENTATION] = 8
        Image.new("RGB", (width, height)).save(tmp_path / "a.jpg", exif=exif)
        assert ImageFolder(tmp_path).size_of("a.jpg") == (width, height)
        assert ImageFolder(tmp_path, reading=ReadOptions(do_exif_transpose=False)).size_of("a.jpg") == (height, width)
