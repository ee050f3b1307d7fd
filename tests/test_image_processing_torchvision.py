# SPDX-License-Identifier: Apache-2.0
"""Tests of the torchvision image processor against the Pillow one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torchvision")

import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.utils.import_utils import BACKENDS_MAPPING

from transformers_fastvlm import (
    FastVLMImageProcessor,
    FastVLMImageProcessorPil,
    image_processing_fastvlm,
)
from transformers_fastvlm.images import resizing

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = json.loads((GOLDEN / "preprocess.json").read_text())
PINPOINTS = json.loads((GOLDEN / "qwen2_anyres" / "config.json").read_text())["image_grid_pinpoints"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_image(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def both(images: Any, call: dict[str, Any] | None = None, device: str = "cpu", **options: Any) -> tuple[Any, Any]:
    """The torchvision processor's answer on `device`, brought to the CPU, and the Pillow processor's."""
    ours = FastVLMImageProcessor(**options)(images, return_tensors="pt", device=device, **(call or {}))
    assert ours.pixel_values.device.type == device
    return ours.to("cpu"), FastVLMImageProcessorPil(**options)(images, return_tensors="pt", **(call or {}))


def grey_levels(ours: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Mean and largest difference in grey levels."""
    assert ours.dtype == reference.dtype == torch.float32
    assert ours.shape == reference.shape
    difference = 255 * (ours.double() - reference.double()).abs()
    return difference.mean().item(), difference.max().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", REFERENCE)
def test_pixels_are_close_to_pillows(name: str, device: str) -> None:
    mode, size, file = name.split(".", 2)
    image = Image.open(GOLDEN / "images" / file)
    ours, reference = both(image, None, device, size=int(size), image_aspect_ratio=mode, image_grid_pinpoints=PINPOINTS)
    assert set(ours) == set(reference)
    mean, largest = grey_levels(ours.pixel_values, reference.pixel_values)
    assert mean < 0.3 and largest < 8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["pad", "square", "anyres"])
@pytest.mark.parametrize("shape", [(900, 100), (100, 900), (701, 700), (700, 701), (64, 64), (5, 3), (1, 1)])
def test_sharp_edges_are_close_to_pillows(shape: tuple[int, int], mode: str, device: str) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (shape[1], shape[0], 3)).astype(np.uint8) * 255
    ours, reference = both(
        Image.fromarray(noise),
        None,
        device,
        size=128,
        image_aspect_ratio=mode,
        image_grid_pinpoints=[[128, 256], [256, 128]],
    )
    mean, largest = grey_levels(ours.pixel_values, reference.pixel_values)
    assert mean < 0.3 and largest < 8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["pad", "square"])
@pytest.mark.parametrize("shape", [(40_000, 40), (40, 40_000), (2000, 40), (40, 2000)])
def test_panoramas(shape: tuple[int, int], mode: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (image_processing_fastvlm, resizing):
        monkeypatch.setattr(module, "MAX_CANVAS_PIXELS", 2**22)
    ours, reference = both(random_image(*shape), None, device, size=128, image_aspect_ratio=mode)
    mean, largest = grey_levels(ours.pixel_values, reference.pixel_values)
    assert mean < 0.3 and largest < 8


@pytest.mark.parametrize("device", DEVICES)
def test_huge_downscale(device: str) -> None:
    ours, reference = both(random_image(4500, 4200), None, device, size=64)
    mean, largest = grey_levels(ours.pixel_values, reference.pixel_values)
    assert mean < 0.3 and largest < 8


def test_every_kind_of_input() -> None:
    image = random_image(64, 64)
    hwc = np.asarray(image)
    tensor = torch.from_numpy(hwc.copy())
    rgba = np.concatenate([hwc, np.full((64, 64, 1), 255, np.uint8)], axis=2)
    inputs = [image, hwc, np.moveaxis(hwc, -1, 0), tensor, tensor.movedim(-1, 0), tensor.int(), hwc / 255]
    inputs += [tensor.float() / 255, (tensor.double() / 255).requires_grad_(), rgba, hwc[:, ::-1][:, ::-1]]
    expected = FastVLMImageProcessorPil(size=64)(image, return_tensors="pt").pixel_values
    processor = FastVLMImageProcessor(size=64)
    for item in inputs:
        assert torch.equal(processor(item, return_tensors="pt").pixel_values, expected)
    assert torch.equal(
        processor([inputs, [tensor[None]]], return_tensors="pt").pixel_values, expected.repeat(12, 1, 1, 1)
    )
    gray = np.asarray(image.convert("L"))
    mask = gray > 100
    for item in (gray, gray[None], gray[..., None], torch.from_numpy(gray.copy()), mask, torch.from_numpy(mask)):
        ours, reference = both(item, size=64)
        assert torch.equal(ours.pixel_values, reference.pixel_values)


def test_files_keep_their_mode_and_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(64, 64).save(tmp_path / "image.jpg", exif=exif)
    random_image(64, 64).quantize(8).save(tmp_path / "image.png")
    for name in ("image.jpg", "image.png"):
        for option in (False, True):
            ours, reference = both(tmp_path / name, size=64, do_exif_transpose=option)
            assert torch.equal(ours.pixel_values, reference.pixel_values)


def test_outputs() -> None:
    options = {"size": 64, "image_aspect_ratio": "anyres", "image_grid_pinpoints": [[128, 64], [128, 128]]}
    images = [random_image(100, 40), random_image(120, 110)]
    ours, reference = both(images, **options)
    assert set(ours) == {"pixel_values", "image_sizes", "num_tiles"}
    for name in ("image_sizes", "num_tiles"):
        assert torch.equal(ours[name], reference[name]) and ours[name].dtype == torch.int64
    processor = FastVLMImageProcessor(size=64)
    assert processor(images, return_tensors="np").pixel_values.dtype == np.float32
    assert [tile.shape for tile in processor(images).pixel_values] == [(3, 64, 64)] * 2


@pytest.mark.parametrize(
    "call",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
        {"image_mean": 0.5, "image_std": 0.5},
        {"do_resize": False},
        {"size": 128},
        {"image_aspect_ratio": "square"},
        {"resample": Image.Resampling.BILINEAR},
    ],
)
def test_options_of_a_call(call: dict[str, Any]) -> None:
    ours, reference = both(random_image(64, 128), call, size=64)
    mean, largest = grey_levels(ours.pixel_values, reference.pixel_values)
    scale = 255 if call.get("do_rescale") is False else 5
    assert mean < 0.3 * scale and largest < 2 * scale


def test_other_numbers_of_channels_without_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, 700, 4), dtype=np.uint8)
    call = {"do_convert_rgb": False, "image_mean": [0.0] * 4, "image_std": [1.0] * 4}
    for limit in (2**26, 0):
        monkeypatch.setattr(image_processing_fastvlm, "MAX_CANVAS_PIXELS", limit)
        ours, reference = both(array, call, size=64)
        assert ours.pixel_values.shape == (1, 4, 64, 64)
        assert grey_levels(ours.pixel_values, reference.pixel_values)[1] < 3


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 8, 8), float("nan")), "values from nan"),
        (torch.full((3, 8, 8), 200.0), r"expected finite values in 0\.\.\.1"),
        (torch.full((3, 8, 8), 300), "from 300 to 300; expected 0...255"),
        (torch.zeros(2, 8, 8), "3 .RGB. or 4 .RGBA. channels"),
        (torch.zeros(3, 8, 3), "first or its last axis"),
        (torch.zeros(3, 0, 9), "at least 1"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "dtype torch.complex64"),
        (np.zeros((8, 8, 2), np.uint8), "3 .RGB. or 4 .RGBA. channels"),
        (Image.new("RGB", (0, 0)), "at least 1"),
        ([], "no images"),
    ],
)
def test_bad_images(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastVLMImageProcessor(size=64)(image)


def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="40x30 = 1200 pixels, more than the limit of 100"):
        FastVLMImageProcessor(size=64)(torch.zeros(3, 30, 40))
    assert FastVLMImageProcessor(size=64, max_pixels=2000)(torch.zeros(3, 30, 40)).pixel_values[0].shape == (3, 64, 64)


def test_images_of_different_shapes_without_resizing() -> None:
    with pytest.raises(ValueError, match="2 different shapes"):
        FastVLMImageProcessor(size=64)([random_image(64, 64), random_image(128, 64)], do_resize=False)
    with pytest.raises(ValueError, match="multiples of 64"):
        FastVLMImageProcessor(size=64)(random_image(), do_resize=False)


def test_bad_options() -> None:
    for image in (torch.zeros(3, 64, 64), np.zeros((64, 64))):
        with pytest.raises(ValueError, match="do_rescale=False was passed with a floating-point image"):
            FastVLMImageProcessor(size=64)(image, do_rescale=False)
    with pytest.raises(ValueError, match="multiple of 64"):
        FastVLMImageProcessor(size=100)
    with pytest.raises(ValueError, match="expected one of 'pad'"):
        FastVLMImageProcessor(image_aspect_ratio="stretch")


def test_missing_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS_MAPPING, "torchvision", (lambda: False, BACKENDS_MAPPING["torchvision"][1]))
    with pytest.raises(ImportError, match=r"(?i)torchvision"):
        FastVLMImageProcessor()


def test_apple_directory_and_saving(tmp_path: Path) -> None:
    processor = FastVLMImageProcessor.from_pretrained(GOLDEN / "qwen2_anyres")
    assert type(processor) is FastVLMImageProcessor
    assert processor.to_dict() == FastVLMImageProcessorPil.from_pretrained(GOLDEN / "qwen2_anyres").to_dict()
    processor.save_pretrained(tmp_path)
    assert FastVLMImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_pillow_is_the_default_and_torchvision_an_option(tmp_path: Path) -> None:
    for saved in (FastVLMImageProcessorPil, FastVLMImageProcessor):
        saved(size=64).save_pretrained(tmp_path)
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is FastVLMImageProcessorPil
        assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")) is FastVLMImageProcessorPil
        assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="torchvision")) is FastVLMImageProcessor
