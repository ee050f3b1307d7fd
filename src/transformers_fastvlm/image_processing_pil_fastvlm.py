# SPDX-License-Identifier: Apache-2.0
"""FastVLM's image processor with Pillow: the exact reference, and the default.

Its pixel values equal those of Apple's code bit for bit. It needs neither torch nor torchvision.
"""

from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, SizeDict
from transformers.processing_utils import Unpack
from transformers.utils import TensorType, is_torch_tensor

from .image_processing_common import (
    FastVLMImageProcessorKwargs,
    FastVLMImageProcessorMixin,
    check_one_shape,
    check_unresized,
    in_parallel,
    per_channel,
)
from .images.anyres import best_resolution
from .images.decoding import load_pixels, oriented
from .images.reading import array_to_pil, check_rescaled, pil_as_is, pil_to_rgb
from .images.resizing import crop_to_square, cut_into_tiles, pad_to_square

__all__ = ["FastVLMImageProcessorPil"]


class FastVLMImageProcessorPil(FastVLMImageProcessorMixin, PilBackend):
    """Turns images into FastVLM's `pixel_values` with Pillow, bit for bit as Apple's reference code does.

    An image is converted to RGB (on a white background if it is transparent), made square, resized with bicubic
    interpolation in 8 bits, divided by 255, and normalized with mean 0 and standard deviation 1, which changes nothing.

    Inputs are Pillow images of any mode; arrays or tensors of shape (height, width), or with 1, 3 or 4 channels first
    or last, of integers in 0...255 or floats in 0...1 (rounded to 8 bits); paths, http(s) URLs or base64; and nested
    lists of these. A call returns

    - `pixel_values`: (total tiles, 3, size, size), float32 in 0...1; one tile per image, except for "anyres";
    - `image_sizes`, for "anyres" only: (images, 2), int64, the original (height, width);
    - `num_tiles`, for "anyres" only: (images,), int64, the base view included, which is the first tile.

    Args:
        size: the side of a tile, a multiple of 64 from 64 to 2048, as a number or `{"height": n, "width": n}`.
        image_aspect_ratio: "pad" centres the image on a black square, "square" crops the centre, "anyres" makes a base
            view of the whole image and cuts it into tiles at the best resolution of `image_grid_pinpoints`.
        image_grid_pinpoints: pairs of width and height, multiples of `size`.
        do_exif_transpose: whether to apply an image's EXIF orientation, as Transformers' `load_image` does; the
            reference does not.
        alpha_background: background colour for transparent images, as numbers from 0 to 255 or a name; None drops
            alpha and shows the colours beneath, as the reference does.
        max_pixels: maximum pixels of a file; None for `PIL.Image.MAX_IMAGE_PIXELS`.
        do_resize: False keeps the size of the images; their sides must be multiples of 64.
        do_convert_rgb: False keeps 1, 3 or 4 channels, for encoders with that many input channels.
        resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std: as in every image processor.

    Each option can also be passed in the call.

    Several images are decoded and resized in parallel, with up to `torch.get_num_threads()` threads.

    Raises:
        ValueError: an invalid option or image; the message says why.
        ConnectionError: a URL cannot be downloaded.

    Example:
        >>> from PIL import Image
        >>> from transformers_fastvlm import FastVLMImageProcessorPil
        >>> processor = FastVLMImageProcessorPil(size=256)
        >>> processor(Image.new("RGB", (640, 480)), return_tensors="np").pixel_values.shape
        (1, 3, 256, 256)
    """

    _prepares_in_parallel = True

    def __init__(self, **kwargs: Unpack[FastVLMImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        do_exif_transpose: bool | None = None,
        do_rescale: bool | None = True,
        alpha_background: tuple[int, int, int] | None = None,
        max_pixels: int | None = None,
        **kwargs: Any,
    ) -> Image.Image:
        """Return one image as a Pillow image, decoded and checked, in mode RGB if `do_convert_rgb`."""
        if isinstance(image, Image.Image):
            image = oriented(load_pixels(image, max_pixels=max_pixels), do_exif_transpose)
            return pil_to_rgb(image, alpha_background) if do_convert_rgb else pil_as_is(image)
        if is_torch_tensor(image):
            image = image.detach().cpu()
            # numpy has no bfloat16
            image = (image.float() if image.is_floating_point() else image).numpy()
        check_rescaled(np.issubdtype(image.dtype, np.floating), do_rescale)
        return array_to_pil(image, input_data_format, bool(do_convert_rgb), alpha_background, max_pixels)

    def _preprocess(
        self,
        images: list[Image.Image],
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
        device: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        def cut(image: Image.Image) -> list[Image.Image]:
            if not do_resize:
                check_unresized(image.height, image.width)
                return [image]
            if image_aspect_ratio == "pad":
                return [pad_to_square(image, size.height, resample)]
            if image_aspect_ratio == "square":
                return [crop_to_square(image, size.height, resample)]
            target = best_resolution((image.height, image.width), image_grid_pinpoints)
            return cut_into_tiles(image, target, size.height, resample)

        views = in_parallel(cut, images)
        tiles = [tile for cut_image in views for tile in cut_image]
        check_one_shape([(len(tile.getbands()), tile.height, tile.width) for tile in tiles])
        channels, height, width = len(tiles[0].getbands()), tiles[0].height, tiles[0].width
        # A pixel has 256 possible values, so scaling and normalizing is a table look-up.
        table = np.arange(256) * (rescale_factor if do_rescale else 1)
        table = np.tile(table.astype(np.float32), (channels, 1))
        if do_normalize:
            mean = np.array(per_channel(image_mean, channels, "image_mean"), np.float32)
            std = np.array(per_channel(image_std, channels, "image_std"), np.float32)
            table = (table - mean[:, None]) / std[:, None]
        pixel_values = np.empty((len(tiles), channels, height, width), np.float32)

        def fill(index: int) -> None:
            pixels = np.asarray(tiles[index]).reshape(height, width, channels)
            for channel in range(channels):
                np.take(table[channel], pixels[..., channel], out=pixel_values[index, channel], mode="clip")

        in_parallel(fill, range(len(tiles)), len(images))
        data: dict[str, Any] = {"pixel_values": pixel_values if return_tensors else list(pixel_values)}
        if image_aspect_ratio == "anyres":
            data["image_sizes"] = np.array([(image.height, image.width) for image in images], np.int64)
            data["num_tiles"] = np.array([len(cut_image) for cut_image in views], np.int64)
        features = BatchFeature(data=data, tensor_type=return_tensors)
        if device is not None and return_tensors in ("pt", TensorType.PYTORCH):
            features = features.to(device)
        return features
