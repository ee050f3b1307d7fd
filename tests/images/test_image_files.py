# SPDX-License-Identifier: Apache-2.0
"""Tests of reading image files, by every way into the package: upright, within bounds, or a clear error."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from transformers_fastvlm import FastVLMImageProcessor, FastVLMImageProcessorPil, data
from transformers_fastvlm.batch.sources import SourceOptions, find_sources
from transformers_fastvlm.cli.cli_images import read_picture
from transformers_fastvlm.data.image_files import ImageFolder
from transformers_fastvlm.evaluation.own_data import read_own_data
from transformers_fastvlm.images.decoding import load_stored, oriented
from transformers_fastvlm.images.reading import read_image
from transformers_fastvlm.server import request_images as http_images
from transformers_fastvlm.server.protocol import Picture

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


Way = Callable[[Path, bytes, bool], Any]


def by_processor(source: Callable[[Path, bytes], Any], kind: Any = FastVLMImageProcessorPil) -> Way:
    """A way in whose result is compared as the image processor's RGB image, before it is resized."""

    def read(path: Path, content: bytes, turns: bool) -> Any:
        processor = kind(size=64)
        image = processor.fetch_images(source(path, content))
        pixels = processor.process_image(image, do_convert_rgb=True, do_exif_transpose=turns)
        return pixels if isinstance(pixels, Image.Image) else np.moveaxis(pixels.numpy(), 0, -1)

    return read


def by_engine(path: Path, content: bytes, turns: bool) -> Any:
    """What a tool hands on is not turned once more by the processor."""
    image = read_picture(str(path), turns)
    return FastVLMImageProcessorPil(size=64).process_image(image, do_convert_rgb=True, do_exif_transpose=True)


def by_batch(path: Path, content: bytes, turns: bool) -> Any:
    (request,) = find_sources([str(path)], SourceOptions(prompt="?", do_exif_transpose=turns))
    assert request.picture is not None
    return request.picture()


def by_table(path: Path, content: bytes, turns: bool) -> Any:
    table = path.with_name("rows.jsonl")
    table.write_text(f'{{"image": "{path.name}"}}')
    (request,) = find_sources([str(table)], SourceOptions(prompt="?", do_exif_transpose=turns))
    assert request.picture is not None
    return request.picture()


def by_data(path: Path, content: bytes, turns: bool) -> Any:
    row = {"image": path.name, "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
    dataset = data.load([row], path.parent, do_exif_transpose=turns)
    assert dataset.image_folder(0).size_of(path.name) == dataset[0]["images"][0].size[::-1]
    return dataset[0]["images"][0]


def by_evaluation(path: Path, content: bytes, turns: bool) -> Any:
    rows = path.with_name("questions.jsonl")
    rows.write_text(f'{{"image": "{path.name}", "question": "q", "answer": "a"}}')
    return read_own_data(rows, "exact", do_exif_transpose=turns).images.open(path.name)


def by_server(path: Path, content: bytes, turns: bool) -> Any:
    (image,) = http_images.decode([Picture("data:", "messages[0]")], [content], 10**6, turns, lambda: None)
    return image


WAYS: dict[str, Way] = {
    "path": by_processor(lambda path, content: path),
    "path as text": by_processor(lambda path, content: str(path)),
    "base64": by_processor(lambda path, content: base64.b64encode(content).decode()),
    "data URI": by_processor(lambda path, content: f"data:image/x;base64,{base64.b64encode(content).decode()}"),
    "torchvision": by_processor(lambda path, content: path, FastVLMImageProcessor),
    "reader": lambda path, content, turns: oriented(read_image(path), turns),
    "command line": lambda path, content, turns: read_picture(str(path), turns),
    "command line, then processor": by_engine,
    "batch": by_batch,
    "batch table": by_table,
    "data": by_data,
    "data bytes": lambda path, content, turns: ImageFolder(None, do_exif_transpose=turns).open({"bytes": content}),
    "evaluation": by_evaluation,
    "server": by_server,
}
NOT_BY_THE_SERVER = ("TIFF", "AVIF")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("format", FORMATS)
def test_images_are_upright_by_every_way_in(format: str, way: str, tmp_path: Path) -> None:
    if way == "server" and format in NOT_BY_THE_SERVER:
        return
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
        assert read_picture(str(path)).size == (24, 16)
    for value in (0, 9, 2**16 - 1):
        exif = Image.Exif()
        exif[ORIENTATION] = value
        noise().save(tmp_path / "odd.png", exif=exif)
        assert read_picture(str(tmp_path / "odd.png")).size == (24, 16)


def test_sizes_of_a_data_set_are_those_after_turning(tmp_path: Path) -> None:
    for width, height in ((801, 800), (64, 33)):  # JPEG's size is read from a draft of it
        exif = Image.Exif()
        exif[ORIENTATION] = 8
        Image.new("RGB", (width, height)).save(tmp_path / "a.jpg", exif=exif)
        assert ImageFolder(tmp_path).size_of("a.jpg") == (width, height)
        assert ImageFolder(tmp_path, do_exif_transpose=False).size_of("a.jpg") == (height, width)
