# SPDX-License-Identifier: Apache-2.0
"""Reading images: from files, URLs, base64, Pillow images and arrays to 8-bit pixels, or a clear error.

Both image processors use this module, so that they accept and refuse the same inputs. An unusable image is an error;
nothing is replaced, clipped or guessed.
"""

import io
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from transformers.image_utils import ChannelDimension
from transformers.utils import logging

from ..tokens import IMAGE_TOKEN
from .base64_images import from_base64, is_data_url
from .bounds import check_dimensions
from .decoding import FIRST_OF_SEVERAL, is_machine_fault, oriented, read_stored
from .fetching import download
from .read_options import ReadOptions

logger = logging.get_logger(__name__)

CHANNELS = (1, 3, 4)
_FEW_BITS = 2**12
_NONE_OF = "it is neither an existing file, nor an http:// or https:// URL, nor base64"
_SHORTEST_BASE64 = 40
"""A shorter text without a prefix is far more likely a wrong path than an image."""
_RANGE_TOLERANCE = 1e-4


def read_image(source: str | os.PathLike, max_pixels: int | None = None) -> Image.Image:
    """Return the decoded image at `source`, in its original mode, with its EXIF orientation not yet applied.

    `oriented` applies the orientation.

    Args:
        source: path of a file, http(s) URL, or base64 of a file's bytes, with or without `data:image/...;base64,`.
        max_pixels: see `check_dimensions`.

    Raises:
        ValueError: not an image, empty, truncated, too large, or a text that is none of the above.
        ConnectionError: the URL cannot be downloaded.
        OSError, MemoryError: a fault of the machine; see `is_machine_fault`.
    """
    name = os.fspath(source)
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if name[:8].lower().startswith(("http://", "https://")):
        return read_stored(io.BytesIO(download(name, "image")), f"the download of {name}", max_pixels)
    if os.path.isfile(name):
        return read_file(name, f"the image file {name!r}", max_pixels)
    shown = name if len(name) <= 80 else f"{name[:77]}..."
    if os.path.isdir(name):
        raise ValueError(f"{shown!r} is a folder; expected an image file.")
    is_base64 = is_data_url(name)
    if not is_base64 and (isinstance(source, os.PathLike) or len(name) < _SHORTEST_BASE64):
        raise ValueError(f"no image at {shown!r}: {_NONE_OF}.{_hint(name)}")
    try:
        content = from_base64(name)
    except ValueError as error:
        if is_base64:
            raise ValueError(f"the base64 image is broken: {error}.") from error
        raise ValueError(f"no image at {shown!r}: {_NONE_OF}: {error}.{_hint(name)}") from error
    if not content:
        raise ValueError("the base64 image is empty (0 bytes).")
    what = "the base64 image" if is_base64 else f"the text {shown!r}, read as base64 since no file has that name,"
    return read_stored(io.BytesIO(content), what, max_pixels)


def _hint(name: str) -> str:
    """Return a hint for a name that looks like a prompt."""
    is_text = IMAGE_TOKEN in name or (any(map(str.isspace, name)) and not os.path.splitext(name)[1])
    return " The first argument is the images; pass a text as text=." if is_text else ""


def read_file(path: str, what: str, max_pixels: int | None = None) -> Image.Image:
    """Return the image in a file, as `read_stored` does.

    Raises:
        ValueError: the file cannot be opened; or see `read_stored`.
        OSError, MemoryError: a fault of the machine; see `is_machine_fault`.
    """
    with open_file(path, what) as file:
        return read_stored(file, what, max_pixels)


def open_file(path: str, what: str) -> BinaryIO:
    """Return an opened file.

    Raises:
        ValueError: the file cannot be opened.
        OSError: a fault of the machine; see `is_machine_fault`.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        if is_machine_fault(error):
            raise
        raise ValueError(f"{what} cannot be read: {error.strerror}, {path!r}.") from error


def as_shown(image: Image.Image, options: ReadOptions) -> Image.Image:
    """Return a decoded image as a viewer shows it: with its orientation applied, and without transparency.

    The result has neither orientation nor transparency, so neither is applied twice.
    """
    shown = opaque(oriented(image, options.do_exif_transpose), options.background)
    if FIRST_OF_SEVERAL in image.info and shown is not image:
        shown.info[FIRST_OF_SEVERAL] = True
    return shown


def opaque(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    """Return a transparent image as RGB on a background colour (None: without alpha); others unchanged."""
    if not image.has_transparency_data:
        return image
    if background is None:
        return pil_to_rgb(image)
    if image.mode == "RGBa" or image.mode == "La":  # premultiplied alpha
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.mode.startswith("I"):  # 16 bits, with one transparent value
        shown = pil_to_rgb(image)
        alpha = Image.fromarray(np.asarray(image) != image.info["transparency"]).convert("L")
    else:
        shown = image.convert("RGBA")
        alpha = shown.getchannel("A")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(shown, mask=alpha)
    return canvas


def pil_to_rgb(image: Image.Image, alpha_background: tuple[int, int, int] | None = None) -> Image.Image:
    """Convert a Pillow image of any mode to RGB; transparent images get a background colour, None drops alpha.

    Pillow would clip modes of more than 8 bits to white. Here 16-bit modes are scaled; mode I needs values in 0...255
    and mode F in 0...1.
    """
    mode = image.mode
    if alpha_background is not None and image.has_transparency_data:
        return opaque(image, alpha_background)
    if mode == "RGB":
        return image
    if mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        _warn_of_darkness(int(wide.max(initial=0)))
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        return Image.fromarray(array_to_uint8(np.asarray(image))).convert("RGB")
    if mode == "La":
        image = image.convert("LA")
    elif mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # Avoids Pillow's warning that a palette's alpha is lost, which is intended here.
        image = image.copy()
        del image.info["transparency"]
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"a Pillow image of mode {mode!r} cannot be converted to RGB: {error}.") from error


def _warn_of_darkness(greatest: int) -> None:
    """Warn if a 16-bit image has only 12-bit values, as from some cameras: it becomes nearly black."""
    if 0 < greatest < _FEW_BITS:
        logger.warning_once(
            f"A 16-bit image has no value above {_FEW_BITS - 1}, as from a 12-bit camera, and becomes nearly black. If "
            "that is not intended, scale it first: Image.fromarray(np.asarray(image) * 16)."
        )


def blended(pixels: Any, background: Any) -> Any:
    """Return an RGBA array or tensor (height, width, 4) blended with a background colour, rounded like Pillow.

    Args:
        pixels: int32 values.
        background: red, green and blue, in the same kind of array and dtype.
    """
    alpha = pixels[..., 3:]
    mixed = pixels[..., :3] * alpha + background * (255 - alpha) + 128
    return ((mixed >> 8) + mixed) >> 8


def pil_as_is(image: Image.Image) -> Image.Image:
    """Return a Pillow image for `do_convert_rgb=False`: modes whose channels can be resized one by one."""
    if image.mode not in ("L", "RGB", "RGBX"):
        raise ValueError(
            f"do_convert_rgb=False needs a Pillow image of mode L, RGB or RGBX, this one is {image.mode!r}; "
            "leave do_convert_rgb at True or convert it first."
        )
    return image


def channel_axis(shape: Sequence[int], input_data_format: str | ChannelDimension | None) -> int:
    """Return the channel axis, 0 or 2, of an image with three axes.

    Raises:
        ValueError: not three axes, no axis of 1, 3 or 4 channels, or both possible and no `input_data_format`.
    """
    shape = tuple(shape)
    if len(shape) != 3:
        raise ValueError(
            f"an image array has shape {shape}; expected (height, width), (height, width, channels) or "
            "(channels, height, width)."
        )
    first, last = shape[0] in CHANNELS, shape[2] in CHANNELS
    if input_data_format is not None:
        axis = 0 if ChannelDimension(input_data_format) == ChannelDimension.FIRST else 2
        if shape[axis] not in CHANNELS:
            raise ValueError(
                f"an image array has shape {shape}, with {shape[axis]} channels under input_data_format "
                f"{ChannelDimension(input_data_format).value!r}; expected 1 (gray), 3 (RGB) or 4 (RGBA) channels."
            )
        return axis
    if first and last:
        raise ValueError(
            f"an image array has shape {shape}: the channels could be its first or its last axis. Pass "
            "input_data_format='channels_first' or 'channels_last'."
        )
    if not first and not last:
        raise ValueError(
            f"an image array has shape {shape}; expected 1 (gray), 3 (RGB) or 4 (RGBA) channels as its "
            "first or last axis."
        )
    return 0 if first else 2


def check_float_range(low: float, high: float) -> None:
    """Raise ValueError unless floating-point pixels lie in 0...1; NaN is an error."""
    if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
        raise ValueError(
            f"a floating-point image has values from {low} to {high}; expected finite values in 0...1. "
            "Divide by its maximum, or pass uint8 values in 0...255."
        )


def check_rescaled(is_float: bool, do_rescale: bool | None) -> None:
    """Raise ValueError if a floating-point image, which is converted to bytes, would be returned as 0...255."""
    if is_float and not do_rescale:
        raise ValueError(
            "do_rescale=False was passed with a floating-point image. Leave it at True: values in 0...1 are returned "
            "in 0...1; only integers in 0...255 are divided."
        )


def check_integer_range(low: int, high: int) -> None:
    """Raise ValueError unless integer pixels lie in 0...255."""
    if low < 0 or high > 255:
        raise ValueError(
            f"an integer image has values from {low} to {high}; expected 0...255. Scale it to uint8 first."
        )


def array_to_uint8(array: np.ndarray) -> np.ndarray:
    """Return the pixels of a non-empty array as uint8: integers in 0...255 unchanged, floats in 0...1 times 255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(array.dtype, np.integer):
        check_integer_range(int(array.min()), int(array.max()))
        return array.astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        check_float_range(float(array.min()), float(array.max()))
        scaled = array.astype(np.float32) * np.float32(255)
        return np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled).astype(np.uint8)
    raise ValueError(f"an image array has dtype {array.dtype}; expected integers in 0...255 or floats in 0...1.")


def array_to_pil(
    array: np.ndarray,
    input_data_format: str | ChannelDimension | None,
    convert_rgb: bool,
    alpha_background: tuple[int, int, int] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Return an array of 1, 3 or 4 channels as a Pillow image.

    Args:
        array: (height, width), (height, width, channels) or (channels, height, width); see `array_to_uint8` for values.
        input_data_format: the channel axis, needed only if the shape is ambiguous.
        convert_rgb: repeat gray and remove alpha; otherwise the mode is L, RGB or RGBX.
        alpha_background: background colour for an image with alpha; None drops alpha.
    """
    if array.ndim == 2:
        array, input_data_format = array[..., None], ChannelDimension.LAST
    if channel_axis(array.shape, input_data_format) == 0:
        array = np.moveaxis(array, 0, -1)
    height, width, channels = array.shape
    check_dimensions(width, height, max_pixels=max_pixels)
    if convert_rgb and channels == 4:
        if alpha_background is None:
            array = array[..., :3]
        else:
            array = blended(array_to_uint8(array).astype(np.int32), np.array(alpha_background, np.int32)).astype(
                np.uint8
            )
        channels = 3
    pixels = np.ascontiguousarray(array_to_uint8(array))
    image = Image.frombytes({1: "L", 3: "RGB", 4: "RGBX"}[channels], (width, height), pixels.tobytes())
    return image.convert("RGB") if convert_rgb and channels == 1 else image
