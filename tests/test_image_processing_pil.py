# SPDX-License-Identifier: Apache-2.0
"""Tests of the Pillow image processor: the reference's pixels, inputs, errors and loading."""

import base64
import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from transformers_fastvlm import (
    FastViTHDConfig,
    FastVLMConfig,
    FastVLMImageProcessorPil,
    image_processing_common,
    image_processing_pil_fastvlm,
)
from transformers_fastvlm.images import resizing

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = json.loads((GOLDEN / "preprocess.json").read_text())
PINPOINTS = json.loads((GOLDEN / "qwen2_anyres" / "config.json").read_text())["image_grid_pinpoints"]


def to_bytes(pixel_values: np.ndarray) -> np.ndarray:
    return np.rint(255 * pixel_values).astype(np.uint8)


def random_image(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def processor() -> FastVLMImageProcessorPil:
    return FastVLMImageProcessorPil(size=64)


def pixels_of(processor: Any, images: Any, **options: Any) -> np.ndarray:
    return processor(images, return_tensors="np", **options).pixel_values


# The reference's pixels


@pytest.mark.parametrize("name", REFERENCE)
def test_pixels_equal_the_reference(name: str) -> None:
    mode, size, file = name.split(".", 2)
    processor = FastVLMImageProcessorPil(size=int(size), image_aspect_ratio=mode, image_grid_pinpoints=PINPOINTS)
    processor.alpha_background = None  # as the reference does
    values = pixels_of(processor, Image.open(GOLDEN / "images" / file))
    values = values if mode == "anyres" else values[0]
    assert values.dtype == np.float32
    assert list(values.shape) == REFERENCE[name]["shape"]
    assert hashlib.sha256(to_bytes(values).tobytes()).hexdigest() == REFERENCE[name]["sha256"]
    assert values.mean(dtype=np.float64) == pytest.approx(REFERENCE[name]["mean"], abs=1e-7)


def test_values_are_bytes_over_255(processor: FastVLMImageProcessorPil) -> None:
    ramp = np.arange(4096, dtype=np.int64).reshape(64, 64) % 256
    values = pixels_of(processor, ramp)
    expected = (ramp * np.float64(1 / 255)).astype(np.float32)
    assert np.array_equal(values, np.broadcast_to(expected, (1, 3, 64, 64)))


def test_resizing_does_not_depend_on_the_order_that_pillow_chooses() -> None:
    tall = random_image(100, 900)
    by_columns = tall.resize((100, 64), 3).resize((64, 64), 3)
    by_rows = tall.resize((64, 900), 3).resize((64, 64), 3)
    assert by_columns.tobytes() != by_rows.tobytes()
    assert resizing.resize(tall, 64, 64, 3).tobytes() == by_columns.tobytes()
    wide = tall.transpose(Image.Transpose.TRANSPOSE)
    expected = wide.resize((64, 100), 3).resize((64, 64), 3)
    assert resizing.resize(wide, 64, 64, 3).tobytes() == expected.tobytes()


# Outputs and options


def test_outputs(processor: FastVLMImageProcessorPil) -> None:
    images = [random_image(40, 30), random_image(10, 90)]
    features = processor(images, return_tensors="pt")
    assert set(features) == {"pixel_values"} == set(processor.model_input_names)
    assert features.pixel_values.shape == (2, 3, 64, 64) and features.pixel_values.dtype == torch.float32
    as_list = processor(images).pixel_values
    assert isinstance(as_list, list) and np.array_equal(np.stack(as_list), features.pixel_values)
    assert processor(images, return_tensors="pt", device="cpu").pixel_values.device.type == "cpu"


def test_anyres_outputs() -> None:
    processor = FastVLMImageProcessorPil(
        size=64, image_aspect_ratio="anyres", image_grid_pinpoints=[[128, 64], [128, 128]]
    )
    images = [random_image(100, 40), random_image(120, 110)]
    features = processor(images, return_tensors="pt")
    assert set(features) == {"pixel_values", "image_sizes", "num_tiles"} == set(processor.model_input_names)
    assert features.image_sizes.tolist() == [[40, 100], [110, 120]] and features.image_sizes.dtype == torch.int64
    assert features.num_tiles.tolist() == [3, 5] and features.num_tiles.dtype == torch.int64
    assert features.pixel_values.shape == (8, 3, 64, 64)
    base = np.asarray(images[0].resize((64, 64), 3)).transpose(2, 0, 1)
    assert np.array_equal(to_bytes(features.pixel_values[0].numpy()), base)
    fitted = np.zeros((64, 128, 3), np.uint8)
    fitted[6:58] = np.asarray(images[0].resize((128, 52), 3))
    tiles = to_bytes(features.pixel_values[1:3].numpy())
    assert np.array_equal(np.concatenate(list(tiles), axis=2), fitted.transpose(2, 0, 1))
    assert processor.get_number_of_image_patches(40, 100) == 3
    assert processor.get_number_of_image_tokens(40, 100) == 3
    assert processor.get_number_of_image_tokens(40, 100, "spatial_unpad") == 1 + 1 * 3


def test_options_of_a_call_replace_the_processors_own(processor: FastVLMImageProcessorPil) -> None:
    image = random_image()
    for size in (128, {"height": 128, "width": 128}, (128, 128)):
        assert pixels_of(processor, image, size=size).shape == (1, 3, 128, 128)
    assert pixels_of(processor, image, size=None).shape == (1, 3, 64, 64)
    square = pixels_of(processor, image, image_aspect_ratio="square")
    assert np.array_equal(square, pixels_of(FastVLMImageProcessorPil(size=64, image_aspect_ratio="square"), image))
    assert not np.array_equal(square, pixels_of(processor, image))
    tiled = processor(image, image_aspect_ratio="anyres", image_grid_pinpoints=[[128, 64]], return_tensors="np")
    assert tiled.num_tiles.tolist() == [3]
    assert processor.get_number_of_image_patches(30, 40) == 1
    assert processor.get_number_of_image_tokens(30, 40, images_kwargs={"size": 512}) == 64
    assert processor.size == {"height": 64, "width": 64} and processor.image_aspect_ratio == "pad"


def test_mean_std_and_scale(processor: FastVLMImageProcessorPil) -> None:
    image = random_image(64, 64)
    raw = np.asarray(image).transpose(2, 0, 1)[None].astype(np.float32)
    assert np.array_equal(pixels_of(processor, image, do_rescale=False, do_normalize=False), raw)
    normalized = pixels_of(processor, image, image_mean=[0.5, 0.4, 0.3], image_std=0.25)
    mean = np.array([0.5, 0.4, 0.3]).reshape(3, 1, 1)
    assert normalized == pytest.approx((raw / 255 - mean) / 0.25, abs=1e-6)
    with pytest.raises(ValueError, match="do_rescale=False was passed with a floating-point image"):
        pixels_of(processor, np.zeros((64, 64)), do_rescale=False)
    with pytest.raises(ValueError, match="image_mean has 2 values, but the images have 3 channels"):
        pixels_of(processor, image, image_mean=[0.5, 0.5])
    with pytest.raises(ValueError, match="other than 0"):
        pixels_of(processor, image, image_std=0.0)


def test_without_resizing(processor: FastVLMImageProcessorPil) -> None:
    image = random_image(192, 128)
    values = pixels_of(processor, image, do_resize=False)
    assert np.array_equal(to_bytes(values[0]), np.asarray(image).transpose(2, 0, 1))
    assert processor.get_number_of_image_tokens(128, 192, images_kwargs={"do_resize": False}) == 6
    with pytest.raises(ValueError, match=r"100x128 \(width x height\).*multiples of 64"):
        pixels_of(processor, random_image(100, 128), do_resize=False)
    with pytest.raises(ValueError, match="2 different shapes"):
        pixels_of(processor, [image, random_image(64, 64)], do_resize=False)
    with pytest.raises(ValueError, match="do_resize=False contradicts"):
        pixels_of(processor, image, do_resize=False, image_aspect_ratio="anyres", image_grid_pinpoints=[[64, 64]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100}, r"size is \{'height': 100, 'width': 100\}; expected .* multiple of 64"),
        ({"size": 0}, "multiple of 64"),
        ({"size": 4096}, "64 to 2048"),
        ({"size": {"height": 128, "width": 256}}, "do_resize=False"),
        ({"size": {"shortest_edge": 256}}, "shortest_edge"),
        ({"image_aspect_ratio": "stretch"}, "'stretch'; expected one of 'pad', 'square', 'anyres'"),
        ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints is None"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[100, 64]]}, "not a multiple of the tile size"),
        ({"crop_size": 64}, "crop_size=.* is not an option"),
        ({"do_pad": True}, "do_pad=True is not an option"),
        ({"data_format": "channels_last"}, "channels_first"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, processor: FastVLMImageProcessorPil) -> None:
    with pytest.raises(ValueError, match=message):
        FastVLMImageProcessorPil(**({"size": 64} | options))
    with pytest.raises(ValueError, match=message):
        processor(random_image(), **options)


# What is read


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"])
def test_eight_bit_modes(processor: FastVLMImageProcessorPil, mode: str) -> None:
    source = random_image(64, 64)
    image = source.convert("RGBA").convert(mode) if mode == "RGBa" else source.convert("P" if mode == "PA" else mode)
    image = image.convert("PA") if mode == "PA" else image
    assert image.mode == mode
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(to_bytes(pixels_of(processor, image)[0]), expected)


def test_premultiplied_gray(processor: FastVLMImageProcessorPil) -> None:
    image = random_image(64, 64).convert("L").convert("LA").convert("La")
    expected = np.asarray(image.convert("LA").convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(to_bytes(pixels_of(processor, image)[0]), expected)


def test_lab(processor: FastVLMImageProcessorPil) -> None:
    lab = Image.new("LAB", (64, 64), (255, 128, 128))
    try:
        lab.convert("RGB")
    except ValueError:
        with pytest.raises(ValueError, match="mode 'LAB' cannot be converted"):
            pixels_of(processor, lab)
    else:
        assert to_bytes(pixels_of(processor, lab)).min() > 240


def test_palette_with_transparency_warns_nobody(processor: FastVLMImageProcessorPil) -> None:
    image = random_image(64, 64).quantize(16)
    image.info["transparency"] = bytes(16)
    values = pixels_of(processor, image, alpha_background=None)
    assert image.info["transparency"] == bytes(16)
    del image.info["transparency"]
    assert np.array_equal(values, pixels_of(processor, image))


def test_modes_of_more_than_eight_bits(processor: FastVLMImageProcessorPil) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    expected = np.broadcast_to(np.rint(ramp / 257).astype(np.uint8), (3, 64, 64))
    assert np.array_equal(to_bytes(pixels_of(processor, Image.fromarray(ramp))[0]), expected)
    whole = Image.fromarray((ramp // 257).astype(np.int32))
    assert whole.mode == "I"
    assert np.array_equal(to_bytes(pixels_of(processor, whole)[0, 0]), ramp // 257)
    unit = Image.fromarray((ramp / 65535).astype(np.float32))
    assert unit.mode == "F"
    assert np.array_equal(to_bytes(pixels_of(processor, unit)[0]), expected)
    with pytest.raises(ValueError, match=r"values from 0 to 65535; expected 0...255"):
        pixels_of(processor, Image.fromarray(ramp.astype(np.int32)))
    with pytest.raises(ValueError, match=r"expected finite values in 0\.\.\.1"):
        pixels_of(processor, Image.fromarray(ramp.astype(np.float32)))


def test_arrays_and_tensors_of_every_layout(processor: FastVLMImageProcessorPil) -> None:
    image = random_image(40, 30)
    hwc = np.asarray(image)
    expected = pixels_of(processor, image)
    unit = hwc.astype(np.float64) / 255
    for array in (
        hwc,
        hwc[:, ::-1][:, ::-1],
        hwc.astype(np.int64),
        unit,
        unit.astype(np.float32),
        unit.astype(np.float16),
    ):
        assert np.array_equal(pixels_of(processor, array), expected)
        assert np.array_equal(pixels_of(processor, np.moveaxis(array, -1, 0)), expected)
    opaque = np.concatenate([hwc, np.zeros((30, 40, 1), np.uint8)], axis=2)
    assert np.array_equal(pixels_of(processor, opaque, alpha_background=None), expected)
    tensor = torch.from_numpy(hwc.copy())
    for other in (tensor, tensor.movedim(-1, 0), tensor.float() / 255, (tensor.double() / 255).requires_grad_()):
        assert np.array_equal(pixels_of(processor, other), expected)
    coarse = pixels_of(processor, (tensor.float() / 255).bfloat16())
    assert coarse == pytest.approx(expected, abs=0.01)


def test_gray_arrays(processor: FastVLMImageProcessorPil) -> None:
    gray = np.asarray(random_image(40, 30).convert("L"))
    expected = pixels_of(processor, Image.fromarray(gray))
    for array in (gray, gray[None], gray[..., None], torch.from_numpy(gray.copy())):
        assert np.array_equal(pixels_of(processor, array), expected)
    mask = gray > 100
    assert np.array_equal(pixels_of(processor, mask), pixels_of(processor, Image.fromarray(mask)))


def test_layout_that_the_shape_leaves_open(processor: FastVLMImageProcessorPil) -> None:
    array = np.zeros((3, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=r"first or its last axis. Pass input_data_format"):
        pixels_of(processor, array)
    array[0] = 255
    first = pixels_of(processor, array, input_data_format="channels_first")
    last = pixels_of(processor, array, input_data_format="channels_last")
    assert first[0, 0].max() == 1 and first[0, 1].max() == 0
    assert np.array_equal(last[0, 0], last[0, 1])


def test_other_numbers_of_channels_without_conversion(processor: FastVLMImageProcessorPil) -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, 70, 4), dtype=np.uint8)
    options = {"do_convert_rgb": False, "image_mean": [0.0] * 4, "image_std": [1.0] * 4}
    values = pixels_of(processor, array, **options)
    for channel in range(4):
        alone = pixels_of(processor, array[..., channel])
        assert np.array_equal(values[:, channel], alone[:, 0])
    with pytest.raises(ValueError, match="mode L, RGB or RGBX, this one is 'P'"):
        pixels_of(processor, random_image().quantize(16), do_convert_rgb=False)


def test_lists(processor: FastVLMImageProcessorPil) -> None:
    a, b, c = (random_image(40, 30, seed) for seed in range(3))
    flat = pixels_of(processor, [a, b, c])
    assert np.array_equal(flat, np.concatenate([pixels_of(processor, image) for image in (a, b, c)]))
    assert np.array_equal(pixels_of(processor, [[a], [], (b, np.asarray(c))]), flat)
    assert np.array_equal(pixels_of(processor, np.stack([np.asarray(image) for image in (a, b, c)])), flat)
    assert np.array_equal(pixels_of(processor, [a, torch.stack([torch.from_numpy(np.array(i)) for i in (b, c)])]), flat)


def test_files_and_base64(processor: FastVLMImageProcessorPil, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    random_image().save(path)
    expected = pixels_of(processor, random_image())
    text = base64.b64encode(path.read_bytes()).decode()
    for source in (
        path,
        str(path),
        text,
        base64.encodebytes(path.read_bytes()).decode(),
        f"data:image/png;base64,{text}",
    ):
        assert np.array_equal(pixels_of(processor, source), expected)
    assert np.array_equal(pixels_of(processor, [[str(path)], [path]]), np.concatenate([expected] * 2))
    path.unlink()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_addresses(processor: FastVLMImageProcessorPil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    random_image().save(tmp_path / "image.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.html").write_text("<html></html>")
    with served(tmp_path) as address:
        assert np.array_equal(pixels_of(processor, f"{address}/image.png"), pixels_of(processor, random_image()))
        with pytest.raises(ConnectionError, match=r"missing.png: the server answered .*404"):
            processor(f"{address}/missing.png")
        with pytest.raises(ValueError, match="empty"):
            processor(f"{address}/empty.png")
        with pytest.raises(ValueError, match="is a web page"):
            processor(f"{address}/page.html")
        monkeypatch.setattr("transformers_fastvlm.images.fetching.MAX_DOWNLOAD_BYTES", 100)
        with pytest.raises(ValueError, match="larger than 100 bytes"):
            processor(f"{address}/image.png")
    with pytest.raises(ConnectionError, match="Check the URL and the network"):
        processor(f"{address}/image.png")


# Batches


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_processing_common, "_cpus", lambda: 4)


def paths_of(images: list[Image.Image], folder: Path) -> list[Path]:
    paths = [folder / f"{index}.png" for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return paths


@pytest.mark.parametrize("mode", ["pad", "square", "anyres"])
def test_batches_in_parallel(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = FastVLMImageProcessorPil(size=64, image_aspect_ratio=mode, image_grid_pinpoints=[[128, 64], [64, 128]])
    images = [random_image(40 + 13 * index, 90 - 7 * index, index) for index in range(7)]
    batches: list[Any] = [images, paths_of(images, tmp_path), [np.asarray(image) for image in images]]
    batches.append([image.convert("RGBA") for image in images])
    batches.append([[*images[:3]], [[str(path) for path in batches[1][3:]]]])
    batches.append([images[0]] * 7)
    in_turn = [processor(batch, return_tensors="np") for batch in batches]
    monkeypatch.setattr(image_processing_common, "_cpus", lambda: 4)
    for batch, expected in zip(batches, in_turn, strict=True):
        found = processor(batch, return_tensors="np")
        assert set(found) == set(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_two_images_are_resized_at_once(
    processor: FastVLMImageProcessorPil, monkeypatch: pytest.MonkeyPatch, four_threads: None
) -> None:
    resize, both = image_processing_pil_fastvlm.pad_to_square, threading.Barrier(2, timeout=60)

    def meet(*args: Any) -> Image.Image:
        both.wait()  # raises if the other one never comes
        return resize(*args)

    monkeypatch.setattr(image_processing_pil_fastvlm, "pad_to_square", meet)
    images = [random_image(), random_image(seed=1)]
    assert pixels_of(processor, images).shape == (2, 3, 64, 64)


def test_threads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, threads: int):
            started.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(image_processing_common, "ThreadPoolExecutor", Pool)
    in_parallel = image_processing_common.in_parallel
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert in_parallel(str, [1, 2]) == ["1", "2"] and not started
        torch.set_num_threads(10_000)
        cpus = image_processing_common._cpus()
        assert cpus <= (os.cpu_count() or 1)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(image_processing_common, "_cpus", lambda: 3)
    assert in_parallel(str, range(5)) == list("01234") and started == [3]
    assert in_parallel(str, range(2)) == ["0", "1"] and started == [3, 2]
    assert in_parallel(str, range(5), 1) == list("01234") and in_parallel(str, [1]) == ["1"] and len(started) == 2


def test_the_first_bad_image_of_a_batch_is_named(
    processor: FastVLMImageProcessorPil, tmp_path: Path, four_threads: None
) -> None:
    paths = paths_of([random_image(300, 300, seed) for seed in range(5)], tmp_path)
    for index in (3, 1):
        paths[index].write_bytes(paths[index].read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"1\.png' is truncated"):
        processor(paths)
    with contextlib.ExitStack() as stack:
        lazy = [stack.enter_context(Image.open(path)) for path in paths]
        with pytest.raises(ValueError, match=r"image 1 \(counting from 0\) of 5: the image is truncated"):
            processor(lazy)
    sizes = [random_image(64, 64), random_image(64, 65), random_image(64, 66)]
    with pytest.raises(ValueError, match="an image is 64x65"):
        processor(sizes, do_resize=False)


def test_images_that_read_one_file_are_decoded_in_turn(
    processor: FastVLMImageProcessorPil, tmp_path: Path, four_threads: None
) -> None:
    images = [random_image(300, 300, seed) for seed in range(6)]
    paths = paths_of(images, tmp_path)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    with tarfile.open(tmp_path / "all.tar") as tar:
        members = [Image.open(tar.extractfile(path.name)) for path in paths]  # type: ignore[arg-type]
        assert not image_processing_common._independent(members)
        assert np.array_equal(pixels_of(processor, members), pixels_of(processor, images))
    with Image.open(paths[0]) as lazy:
        assert not image_processing_common._independent([lazy, lazy])
        assert np.array_equal(pixels_of(processor, [lazy] * 4), pixels_of(processor, [images[0]] * 4))
    with Image.open(paths[0]) as first, Image.open(paths[1]) as second:
        assert image_processing_common._independent([first, second, np.zeros(3), torch.zeros(3)])


# What is refused


def test_damaged_files(processor: FastVLMImageProcessorPil, tmp_path: Path) -> None:
    whole = io.BytesIO()
    random_image(200, 200).save(whole, "PNG")
    cases = {
        "empty.png": (b"", r"empty.png' is empty \(0 bytes\)"),
        "short.png": (whole.getvalue()[:20000], "truncated or damaged"),
        "header.png": (whole.getvalue()[:30], "header.png' is (damaged|not an image)"),
        "text.png": (b"no image at all", "not an image of a supported format"),
    }
    random_image(200, 200).save(tmp_path / "whole.jpg")
    cases["short.jpg"] = ((tmp_path / "whole.jpg").read_bytes()[:5000], "truncated")
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            processor(tmp_path / name)
    with Image.open(tmp_path / "short.jpg") as lazy, pytest.raises(ValueError, match="truncated"):
        processor(lazy)
    with (
        Image.open(tmp_path / "short.jpg") as lazy,
        pytest.raises(ValueError, match=r"image 1 .* of 2: the image is trunc"),
    ):
        processor([random_image(), lazy])


def test_missing_files(processor: FastVLMImageProcessorPil, tmp_path: Path) -> None:
    for name in ("missing.png", tmp_path / "missing.png", "", "x.y" * 10_000):
        with pytest.raises(ValueError, match="neither an existing file, nor an http"):
            processor(name)
    with pytest.raises(ValueError, match="is a folder"):
        processor(str(tmp_path))
    with pytest.raises(ValueError, match="abc', read as base64 since no file has that name, is not an image"):
        processor("/abc" * 10)


def test_decompression_bombs(
    processor: FastVLMImageProcessorPil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.png"
    random_image(40, 30).save(path)
    # Pillow itself warns above the limit, and raises above twice the limit.
    for limit in (1199, 700, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="MAX_IMAGE_PIXELS"):
            processor(path)
        array = np.asarray(random_image(40, 30))
        assert pixels_of(processor, random_image(40, 30)).shape == (1, 3, 64, 64)  # decoded already, by the caller
        for image in (path, array) if limit == 1199 else (array,):
            with pytest.raises(ValueError, match=f"40x30 = 1200 pixels, more than the limit of {limit}"):
                processor(image)
    for limit in (1200, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert pixels_of(processor, path).shape == (1, 3, 64, 64)


def test_no_pixels(processor: FastVLMImageProcessorPil) -> None:
    empty = (Image.new("RGB", (0, 0)), Image.new("RGB", (5, 0)), np.zeros((0, 0, 3), np.uint8), torch.zeros(3, 0, 9))
    for image in empty:
        with pytest.raises(ValueError, match="both sides must be at least 1"):
            processor(image)
    for images in ([], [[], []]):
        with pytest.raises(ValueError, match="no images"):
            processor(images)


@pytest.mark.parametrize("mode", ["pad", "square", "anyres"])
def test_one_pixel(mode: str) -> None:
    processor = FastVLMImageProcessorPil(size=64, image_aspect_ratio=mode, image_grid_pinpoints=[[128, 64]])
    values = to_bytes(pixels_of(processor, Image.new("RGB", (1, 1), (10, 20, 30))))
    assert values[0].reshape(3, -1).T.tolist() == [[10, 20, 30]] * 4096


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((8, 8, 3), np.nan, np.float32), "values from nan"),
        (np.full((8, 8, 3), np.inf), "to inf"),
        (np.full((8, 8, 3), 200.0), r"from 200.0 to 200.0; expected finite values in 0\.\.\.1"),
        (np.full((8, 8, 3), -1), "from -1 to -1; expected 0...255"),
        (np.full((8, 8, 3), 300, np.uint16), "from 300 to 300"),
        (np.zeros((8, 8, 2), np.uint8), "1 .gray., 3 .RGB. or 4 .RGBA. channels"),
        (np.zeros((5, 8, 8), np.uint8), "1 .gray., 3 .RGB. or 4 .RGBA. channels"),
        (np.zeros((2, 2, 2, 8, 3), np.uint8), r"shape \(2, 2, 2, 8, 3\); expected"),
        (np.zeros(8, np.uint8), r"shape \(8,\); expected"),
        (np.zeros((8, 8, 3), complex), "dtype complex128"),
    ],
)
def test_bad_arrays(processor: FastVLMImageProcessorPil, array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(array)


def test_bad_channels_under_a_given_layout(processor: FastVLMImageProcessorPil) -> None:
    with pytest.raises(ValueError, match="8 channels under input_data_format 'channels_first'"):
        processor(np.zeros((8, 8, 3), np.uint8), input_data_format="channels_first")


@pytest.mark.parametrize("image", [3, None, b"bytes", {"url": "x"}, [random_image(), 3.5]])
def test_no_image_at_all(processor: FastVLMImageProcessorPil, image: Any) -> None:
    with pytest.raises(TypeError, match="expected a Pillow image, a numpy array"):
        processor(image)


# Extreme shapes


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("resize", [resizing.pad_to_square, resizing.crop_to_square])
def test_the_partial_pass_equals_pillow(resize: Any, resample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (1, 90), (90, 1), (300, 7), (7, 300), (100, 99), (99, 100), (400, 130), (130, 400), (64, 200)]
    for index, (width, height) in enumerate(shapes):
        mode, channels = (("RGB", 3), ("L", 1), ("RGBX", 4))[index % 3]
        noise = (rng.integers(0, 2, (height, width, channels)) * 255).astype(np.uint8)
        image = Image.frombytes(mode, (width, height), noise.tobytes())
        monkeypatch.setattr(resizing, "MAX_CANVAS_PIXELS", 2**26)
        whole = resize(image, 64, resample)
        monkeypatch.setattr(resizing, "MAX_CANVAS_PIXELS", 0)
        assert resize(image, 64, resample).tobytes() == whole.tobytes(), (width, height, mode)


@pytest.mark.parametrize("shape", [(20_000, 200), (200, 20_000)])
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_panoramas_need_no_large_canvas(
    mode: str, shape: tuple[int, int], processor: FastVLMImageProcessorPil, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0
    new, resize = Image.new, Image.Image.resize

    def counted_new(kind: str, size: tuple[int, int], *args: Any) -> Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return new(kind, size, *args)

    def counted_resize(image: Image.Image, size: tuple[int, int], *args: Any) -> Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(image, size, *args)

    image = Image.new("RGB", shape, (200, 100, 50))
    monkeypatch.setattr(Image, "new", counted_new)
    monkeypatch.setattr(Image.Image, "resize", counted_resize)
    values = to_bytes(pixels_of(processor, image, size=1024, image_aspect_ratio=mode)[0])
    assert 0 < largest <= shape[0] * shape[1] * 6
    if mode == "square":
        assert (values == np.array([200, 100, 50]).reshape(3, 1, 1)).all()
    else:
        lit = values[0] > 0
        assert 8 <= min(lit.any(0).sum(), lit.any(1).sum()) <= 16
        assert max(lit.any(0).sum(), lit.any(1).sum()) == 1024


@pytest.mark.parametrize("shape", [(300, 700), (1, 600), (511, 512), (700, 1400)])
def test_bands_of_a_tall_image_are_the_whole(shape: tuple[int, int]) -> None:
    image, (width, height) = random_image(*shape), shape
    canvas = Image.new("RGB", (height, height))
    canvas.paste(image, ((height - width) // 2, 0))
    for resample in (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
        for side in (64, 832):
            found = resizing.pad_to_square(image, side, resample)
            assert found.tobytes() == resizing.resize(canvas, side, side, resample).tobytes()


def test_limits_of_extreme_shapes(processor: FastVLMImageProcessorPil) -> None:
    with pytest.raises(ValueError, match="sides up to 1048576"):
        processor(Image.new("L", (2**20 + 1, 1)))
    with pytest.raises(ValueError, match="resample is LANCZOS; an image this long"):
        processor(Image.new("L", (20_000, 10)), resample=Image.Resampling.LANCZOS)


# Loading and saving


def write_config(folder: Path, config: dict[str, Any], name: str = "config.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied", "llama", "qwen2_anyres"])
def test_apple_directory(name: str) -> None:
    processor = FastVLMImageProcessorPil.from_pretrained(GOLDEN / name)
    config = json.loads((GOLDEN / name / "config.json").read_text())
    assert processor.size == {"height": 256, "width": 256}
    assert processor.image_aspect_ratio == config["image_aspect_ratio"]
    assert processor.image_grid_pinpoints == config.get("image_grid_pinpoints")
    assert FastVLMImageProcessorPil.from_pretrained(GOLDEN / name / "config.json").to_dict() == processor.to_dict()
    assert FastVLMImageProcessorPil.from_pretrained(str(GOLDEN / name), size=128).size == {"height": 128, "width": 128}
    _, unused = FastVLMImageProcessorPil.from_pretrained(GOLDEN / name, other=1, return_unused_kwargs=True)
    assert unused == {"other": 1}


def test_apple_directory_without_an_aspect_ratio_crops(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "qwen2_tied" / "config.json").read_text())
    del config["image_aspect_ratio"]
    assert FastVLMImageProcessorPil.from_pretrained(write_config(tmp_path, config)).image_aspect_ratio == "square"


def test_hub_id(tmp_path: Path) -> None:
    repository = tmp_path / "models--apple--FastVLM-0.5B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(GOLDEN / "qwen2_anyres" / "config.json", snapshot)
    processor = FastVLMImageProcessorPil.from_pretrained(
        "apple/FastVLM-0.5B", cache_dir=tmp_path, local_files_only=True
    )
    assert processor.size.height == 256 and processor.image_aspect_ratio == "anyres"


def test_own_configurations(tmp_path: Path) -> None:
    vision = FastViTHDConfig(image_size=512)
    FastVLMConfig(
        vision_config=vision, image_aspect_ratio="anyres", image_grid_pinpoints=[[512, 1024]]
    ).save_pretrained(tmp_path / "whole")
    processor = FastVLMImageProcessorPil.from_pretrained(tmp_path / "whole")
    assert processor.size.height == 512 and processor.image_grid_pinpoints == [[512, 1024]]
    vision.save_pretrained(tmp_path / "encoder")
    assert FastVLMImageProcessorPil.from_pretrained(tmp_path / "encoder").size.height == 512


def test_exports_for_other_tools_load_by_their_config(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "qwen2_tied" / "config.json", tmp_path)
    write_config(tmp_path, {"image_processor_type": "CLIPImageProcessor", "crop_size": 9}, "preprocessor_config.json")
    assert FastVLMImageProcessorPil.from_pretrained(tmp_path).size.height == 256


def test_directories_of_other_models(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "qwen2_tied" / "config.json").read_text())
    config["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    with pytest.raises(ValueError, match="openai/clip-vit-large-patch14-336"):
        FastVLMImageProcessorPil.from_pretrained(write_config(tmp_path / "clip", config))
    with pytest.raises(ValueError, match=r"not a FastVLM checkpoint.*'bert'"):
        FastVLMImageProcessorPil.from_pretrained(write_config(tmp_path / "bert", {"model_type": "bert"}))
    other = write_config(tmp_path / "vit", {"image_processor_type": "ViTImageProcessor"}, "preprocessor_config.json")
    with pytest.raises(ValueError, match="image processor is 'ViTImageProcessor'"):
        FastVLMImageProcessorPil.from_pretrained(other)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(OSError, match=r"cannot read a preprocessor_config\.json or config\.json of"):
        FastVLMImageProcessorPil.from_pretrained(tmp_path / "nothing")


def test_a_saved_processor_stays_what_it_was(tmp_path: Path) -> None:
    options = {
        "size": 128,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[128, 256], [256, 128]],
        "do_exif_transpose": True,
        "alpha_background": (1, 2, 3),
        "image_mean": [0.5, 0.4, 0.3],
    }
    first = FastVLMImageProcessorPil(**options)
    first.save_pretrained(tmp_path)
    for again in (FastVLMImageProcessorPil.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(again) is FastVLMImageProcessorPil
        assert again.to_dict() == first.to_dict()
        assert np.array_equal(pixels_of(again, random_image()), pixels_of(first, random_image()))


def test_a_saved_processor_wins_over_the_model_config(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "qwen2_tied" / "config.json", tmp_path)
    FastVLMImageProcessorPil(size=512).save_pretrained(tmp_path)
    assert FastVLMImageProcessorPil.from_pretrained(tmp_path).size.height == 512
