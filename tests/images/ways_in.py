# SPDX-License-Identifier: Apache-2.0
"""Every way in which an image file comes into the package: each is given a path and its bytes, and whether to turn."""

import base64
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transformers_fastvlm import FastVLMImageProcessor, FastVLMImageProcessorPil, data
from transformers_fastvlm.batch.sources import SourceOptions, find_sources
from transformers_fastvlm.cli.cli_images import read_named_image
from transformers_fastvlm.data.image_files import ImageFolder
from transformers_fastvlm.demo.page_images import read_images
from transformers_fastvlm.evaluation.own_data import read_own_data
from transformers_fastvlm.images.decoding import oriented
from transformers_fastvlm.images.read_options import ReadOptions
from transformers_fastvlm.images.reading import read_image
from transformers_fastvlm.server import request_images as http_images
from transformers_fastvlm.server.protocol import ImageUrl

Way = Callable[[Path, bytes, bool], Any]


def by_processor(source: Callable[[Path, bytes], Any], kind: Any = FastVLMImageProcessorPil) -> Way:
    """A way in whose result is compared as the image processor's RGB image, before it is resized."""

    def read(path: Path, content: bytes, turns: bool) -> Any:
        processor = kind(size=64)
        image = processor.fetch_images(source(path, content))
        pixels = processor.process_image(
            image, do_convert_rgb=True, do_exif_transpose=turns, alpha_background=(255, 255, 255)
        )
        return pixels if isinstance(pixels, Image.Image) else np.moveaxis(pixels.numpy(), 0, -1)

    return read


def by_engine(path: Path, content: bytes, turns: bool) -> Any:
    """What a tool hands on is not turned once more by the processor."""
    image = read_named_image(str(path), ReadOptions(do_exif_transpose=turns))
    return FastVLMImageProcessorPil(size=64).process_image(image, do_convert_rgb=True, do_exif_transpose=True)


def by_batch(path: Path, content: bytes, turns: bool) -> Any:
    (request,) = find_sources([str(path)], SourceOptions(prompt="?", do_exif_transpose=turns))
    assert request.open_image is not None
    return request.open_image()


def by_table(path: Path, content: bytes, turns: bool) -> Any:
    table = path.with_name("rows.jsonl")
    table.write_text(f'{{"image": "{path.name}"}}')
    (request,) = find_sources([str(table)], SourceOptions(prompt="?", do_exif_transpose=turns))
    assert request.open_image is not None
    return request.open_image()


def by_data(path: Path, content: bytes, turns: bool) -> Any:
    row = {"image": path.name, "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
    dataset = data.load([row], path.parent, do_exif_transpose=turns)
    assert dataset.image_folder(0).size_of(path.name) == dataset[0]["images"][0].size[::-1]
    return dataset[0]["images"][0]


def by_evaluation(path: Path, content: bytes, turns: bool) -> Any:
    rows = path.with_name("questions.jsonl")
    rows.write_text(f'{{"image": "{path.name}", "question": "q", "answer": "a"}}')
    return read_own_data(rows, "exact", reading=ReadOptions(do_exif_transpose=turns)).images.open(path.name)


def by_standard_input(path: Path, content: bytes, turns: bool) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return read_named_image("-", ReadOptions(do_exif_transpose=turns))


def by_demo(path: Path, content: bytes, turns: bool) -> Any:
    if not turns:  # the page has no such option
        return by_batch(path, content, turns)
    return read_images([str(path)])[0]


def by_server(path: Path, content: bytes, turns: bool) -> Any:
    options = ReadOptions(do_exif_transpose=turns, max_pixels=10**6)
    (image,) = http_images.decode([ImageUrl("data:", "messages[0]")], [content], options, lambda: None)
    return image


def by_data_bytes(path: Path, content: bytes, turns: bool) -> Any:
    return ImageFolder(None, reading=ReadOptions(do_exif_transpose=turns)).open({"bytes": content})


WAYS: dict[str, Way] = {
    "path": by_processor(lambda path, content: path),
    "path as text": by_processor(lambda path, content: str(path)),
    "base64": by_processor(lambda path, content: base64.b64encode(content).decode()),
    "data URI": by_processor(lambda path, content: f"data:image/x;base64,{base64.b64encode(content).decode()}"),
    "torchvision": by_processor(lambda path, content: path, FastVLMImageProcessor),
    "reader": lambda path, content, turns: oriented(read_image(path), turns),
    "command line": lambda path, content, turns: read_named_image(str(path), ReadOptions(do_exif_transpose=turns)),
    "command line, then processor": by_engine,
    "standard input": by_standard_input,
    "demo": by_demo,
    "batch": by_batch,
    "batch table": by_table,
    "data": by_data,
    "data bytes": by_data_bytes,
    "evaluation": by_evaluation,
    "server": by_server,
}
