# SPDX-License-Identifier: Apache-2.0
"""FastVLM's image processor with torchvision: the same interface as the Pillow one, on CPU and GPU.

Its resampling differs from Pillow's by rounding: on average by less than 0.3 of a grey level.
"""

from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, SizeDict
from transformers.processing_utils import Unpack
from transformers.utils import TensorType, is_torch_available, is_torch_tensor, requires_backends

from .image_processing_common import (
    FastVLMImageProcessorKwargs,
    FastVLMImageProcessorMixin,
    check_one_shape,
    check_unresized,
    per_channel,
)
from .images.anyres import best_resolution, fitted_size
from .images.bounds import check_dimensions
from .images.decoding import load_pixels, oriented
from .images.reading import (
    array_to_uint8,
    blended,
    channel_axis,
    check_float_range,
    check_integer_range,
    check_rescaled,
    pil_as_is,
    pil_to_rgb,
)
from .images.resizing import MAX_CANVAS_PIXELS, crop_to_square, pad_to_square, vertical_first

if is_torch_available():
    import torch

__all__ = ["FastVLMImageProcessor"]

_MAX_CUDA_SCALE = 64
"""CUDA's antialiased resize keeps the weights of one output in shared memory, which is too small for larger factors."""


class FastVLMImageProcessor(FastVLMImageProcessorMixin, TorchvisionBackend):
    """Turns images into FastVLM's `pixel_values` with torchvision, on the CPU or, with `device`, on a GPU.

    Options, inputs, outputs and errors are those of `FastVLMImageProcessorPil`, the exact reference. Tensors are
    resized on their own device unless `device` is given. Pillow resizes images of extreme shape.

    Raises:
        ImportError: torchvision is not installed.

    Example:
        >>> import torch
        >>> from transformers_fastvlm import FastVLMImageProcessor
        >>> processor = FastVLMImageProcessor(size=256)
        >>> processor(torch.zeros(3, 480, 640, dtype=torch.uint8), return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 256, 256])
    """

    def __init__(self, **kwargs: Unpack[FastVLMImageProcessorKwargs]) -> None:
        requires_backends(self, ["torch", "torchvision"])
        super().__init__(**kwargs)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: Any = None,
        do_exif_transpose: bool | None = None,
        do_rescale: bool | None = True,
        alpha_background: tuple[int, int, int] | None = None,
        max_pixels: int | None = None,
        **kwargs: Any,
    ) -> "torch.Tensor":
        """Return one image as (channels, height, width) bytes on `device`, with 3 channels if `do_convert_rgb`."""
        if isinstance(image, Image.Image):
            image = oriented(load_pixels(image, max_pixels=max_pixels), do_exif_transpose)
            pixels = _from_pil(pil_to_rgb(image, alpha_background) if do_convert_rgb else pil_as_is(image))
            return pixels if device is None else pixels.to(device)
        if image.ndim == 2:
            image, input_data_format = image[None], ChannelDimension.FIRST
        axis = channel_axis(image.shape, input_data_format)
        height, width = image.shape[1:] if axis == 0 else image.shape[:2]
        check_dimensions(width, height, max_pixels=max_pixels)
        is_tensor = is_torch_tensor(image)
        is_float = image.is_floating_point() if is_tensor else np.issubdtype(image.dtype, np.floating)
        check_rescaled(is_float, do_rescale)
        if is_tensor:
            pixels = _tensor_to_uint8(image.detach() if device is None else image.detach().to(device))
        else:
            pixels = torch.from_numpy(np.array(array_to_uint8(image), order="C"))
            pixels = pixels if device is None else pixels.to(device)
        if axis == 2:
            pixels = pixels.movedim(-1, 0)
        if do_convert_rgb:
            if len(pixels) == 4 and alpha_background is not None:
                colours = torch.tensor(alpha_background, dtype=torch.int32, device=pixels.device)
                pixels = blended(pixels.to(torch.int32).movedim(0, -1), colours).movedim(-1, 0).to(torch.uint8)
            pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
        return pixels.contiguous()

    def _preprocess(
        self,
        images: list["torch.Tensor"],
        *,
        do_resize: bool | None,
        size: SizeDict,
        resample: int,
        do_rescale: bool | None,
        rescale_factor: float,
        do_normalize: bool | None,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        image_aspect_ratio: str,
        image_grid_pinpoints: list[list[int]],
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> BatchFeature:
        tiles: list[torch.Tensor] = []
        counts: list[int] = []
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        for image, size_hw in zip(images, sizes, strict=True):
            if not do_resize:
                check_unresized(*size_hw)
                views = image[None]
            elif image_aspect_ratio == "anyres":
                views = self._tiles(image, best_resolution(size_hw, image_grid_pinpoints), size.height, resample)
            else:
                make_square = self._padded if image_aspect_ratio == "pad" else self._cropped
                views = make_square(image, size.height, resample)[None]
            tiles.append(views)
            counts.append(len(views))

        check_one_shape([tuple(views.shape[1:]) for views in tiles])
        pixel_values = torch.cat(tiles).to(torch.float32)
        if do_rescale:
            # Division rounds like the reference, which multiplies in double precision.
            pixel_values = pixel_values.div_(255) if rescale_factor == 1 / 255 else pixel_values.mul_(rescale_factor)
        if do_normalize:
            channels = pixel_values.shape[1]
            mean = per_channel(image_mean, channels, "image_mean")
            std = per_channel(image_std, channels, "image_std")
            if any(mean) or set(std) != {1.0}:
                pixel_values = self.normalize(pixel_values, mean, std, inplace=True)

        if return_tensors in ("np", TensorType.NUMPY):
            pixel_values = pixel_values.cpu()
        data: dict[str, Any] = {"pixel_values": pixel_values if return_tensors else list(pixel_values)}
        if image_aspect_ratio == "anyres":
            data["image_sizes"] = np.array(sizes, np.int64)
            data["num_tiles"] = np.array(counts, np.int64)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _scaled(self, image: "torch.Tensor", height: int, width: int, resample: int) -> "torch.Tensor":
        """Resize (channels, h, w) bytes to (channels, height, width) bytes, antialiased.

        The axes are resized one after the other and rounded to bytes in between, as in Pillow. A single pass in
        floating point differs visibly where the filter overshoots at sharp edges, as in text.
        """
        columns_first = vertical_first((image.shape[1], image.shape[2]), (height, width))
        between = (height, image.shape[2]) if columns_first else (image.shape[1], width)
        for size_hw in (between, (height, width)):
            if image.shape[1:] == size_hw:
                continue
            target = SizeDict(height=size_hw[0], width=size_hw[1])
            shrink = max(image.shape[1] / size_hw[0], image.shape[2] / size_hw[1])
            if image.device.type == "cpu" or (image.device.type == "cuda" and shrink <= _MAX_CUDA_SCALE):
                image = self.resize(image, target, resample)
            else:
                image = self.resize(image.cpu(), target, resample).to(image.device)
        return image

    def _padded(self, image: "torch.Tensor", side: int, resample: int) -> "torch.Tensor":
        """Centre on a black square of the longer side and scale to `side`."""
        channels, height, width = image.shape
        long = max(height, width)
        if height == width:
            return self._scaled(image, side, side, resample)
        if long * (long if height > width else side) > MAX_CANVAS_PIXELS:
            return _from_pil(pad_to_square(_to_pil(image), side, resample)).to(image.device)
        if width > height:
            # Resampling along the rows leaves black rows black, so they are added afterwards.
            top = (long - height) // 2
            canvas = image.new_zeros((channels, long, side))
            canvas[:, top : top + height] = self._scaled(image, height, side, resample)
        else:
            left = (long - width) // 2
            canvas = image.new_zeros((channels, long, long))
            canvas[:, :, left : left + width] = image
        return self._scaled(canvas, side, side, resample)

    def _cropped(self, image: "torch.Tensor", side: int, resample: int) -> "torch.Tensor":
        """Scale the shorter side to `side` and crop the centre."""
        _, height, width = image.shape
        scaled = int(side * max(height, width) / min(height, width))
        if scaled * side > MAX_CANVAS_PIXELS:
            return _from_pil(crop_to_square(_to_pil(image), side, resample)).to(image.device)
        start = (scaled - side) // 2
        if width >= height:
            return self._scaled(image, side, scaled, resample)[:, :, start : start + side]
        return self._scaled(image, scaled, side, resample)[:, start : start + side]

    def _tiles(self, image: "torch.Tensor", target_hw: tuple[int, int], side: int, resample: int) -> "torch.Tensor":
        """Return the base view and the image's tiles at `target_hw`: (1 + tiles, channels, side, side) bytes."""
        target_h, target_w = target_hw
        height, width = fitted_size(tuple(image.shape[1:]), target_hw)
        top, left = (target_h - height) // 2, (target_w - width) // 2
        canvas = image.new_zeros((len(image), target_h, target_w))
        canvas[:, top : top + height, left : left + width] = self._scaled(image, height, width, resample)
        tiles = canvas.unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        return torch.cat([self._scaled(image, side, side, resample)[None], tiles])


def _from_pil(image: Image.Image) -> "torch.Tensor":
    pixels = torch.from_numpy(np.array(image))
    return (pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)).contiguous()


def _to_pil(image: "torch.Tensor") -> Image.Image:
    mode = {1: "L", 3: "RGB", 4: "RGBX"}[len(image)]
    return Image.frombytes(mode, (image.shape[2], image.shape[1]), image.movedim(0, -1).cpu().numpy().tobytes())


def _tensor_to_uint8(pixels: "torch.Tensor") -> "torch.Tensor":
    """The tensor form of `array_to_uint8`."""
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.is_complex():
        raise ValueError(f"an image tensor has dtype {pixels.dtype}; expected integers in 0...255 or floats in 0...1.")
    low, high = pixels.min().item(), pixels.max().item()
    if pixels.is_floating_point():
        check_float_range(low, high)
        return pixels.to(torch.float32).mul(255).clamp_(0, 255).round_().to(torch.uint8)
    check_integer_range(int(low), int(high))
    return pixels.to(torch.uint8)
