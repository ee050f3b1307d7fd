# SPDX-License-Identifier: Apache-2.0
"""The three ways of making an image square, with Pillow's 8-bit resampling, and the same for extreme shapes.

Pillow resamples one axis after the other and rounds to bytes in between, so the order matters. Pillow 13 chooses it by
the shape; here this rule is applied explicitly, so that every version of Pillow gives the same pixels.

Padding a panorama to a square, or scaling its short side up before a centre crop, can need a canvas of 10^10 pixels, of
which only a small part is visible. The pass along the oversized axis then computes only the visible part, with exactly
Pillow's weights: fixed-point with 22 fractional bits, applied in exact integer arithmetic.

Sources: LLaVA's and Apple's preprocessing (padding, cropping and rounding); Pillow's documentation of its
resampling filters; Keys, *Cubic convolution interpolation for digital image processing*, 1981 (a = -0.5).
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from .anyres import fitted_size

MAX_CANVAS_PIXELS = 2**26
"""Intermediate canvases never have more pixels than this."""

_FRACTION_BITS = 22
_BAND = 256
_BLOCK = 2**20
_MIN_BLOCK_WIDTH = 2**10
_Resampling = Image.Resampling
_TRANSPOSE = Image.Transpose.TRANSPOSE


def vertical_first(size_hw: tuple[int, int], target_hw: tuple[int, int]) -> bool:
    """Whether columns are resampled before rows: if the height loses over twice as many pixels as the width."""
    shrink_h, shrink_w = size_hw[0] - target_hw[0], size_hw[1] - target_hw[1]
    return shrink_h > 0 and shrink_h > 2 * shrink_w


def resize(image: Image.Image, width: int, height: int, resample: int) -> Image.Image:
    """Resize as Pillow 13 does, whatever the version."""
    if vertical_first((image.height, image.width), (height, width)):
        image = image.resize((image.width, height), resample)
    else:
        image = image.resize((width, image.height), resample)
    return image.resize((width, height), resample)


def pad_to_square(image: Image.Image, side: int, resample: int) -> Image.Image:
    """Centre `image` on a black square of its longer side, then scale that to (side, side)."""
    width, height = image.size
    long = max(width, height)
    if width == height:
        return resize(image, side, side, resample)
    left, top = (long - width) // 2, (long - height) // 2
    if long * long <= MAX_CANVAS_PIXELS:
        # Rows are resampled first and independently, so a canvas of (long, long) is never needed.
        if width < height:
            return _padded_rows(image, long, left, side, resample).resize((side, side), resample)
        canvas = Image.new(image.mode, (side, long))
        canvas.paste(image.resize((side, height), resample), (0, top))
        return canvas.resize((side, side), resample)
    result = Image.new(image.mode, (side, side))
    if width > height:
        flat = image.resize((side, height), resample)
        first, last = _touched(long, side, top, height, resample)
        rows = _resample_lines(_rows(flat), long, top, side, range(first, last), resample)
        result.paste(_from_rows(rows, flat), (0, first))
    else:
        first, last = _touched(long, side, left, width, resample)
        columns = _resample_lines(_columns(image), long, left, side, range(first, last), resample)
        result.paste(_from_columns(columns, image).resize((last - first, side), resample), (first, 0))
    return result


def _padded_rows(image: Image.Image, long: int, left: int, side: int, resample: int) -> Image.Image:
    """Return the rows of `image`, placed at `left` on black rows of `long` pixels and resampled to `side` pixels."""
    result = Image.new(image.mode, (side, image.height))
    for top in range(0, image.height, _BAND):
        bottom = min(top + _BAND, image.height)
        canvas = Image.new(image.mode, (long, bottom - top))
        canvas.paste(image.crop((0, top, image.width, bottom)), (left, 0))
        result.paste(canvas.resize((side, bottom - top), resample), (0, top))
    return result


def crop_to_square(image: Image.Image, side: int, resample: int) -> Image.Image:
    """Scale the shorter side of `image` to `side`, then crop the centre (side, side)."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    scaled = int(side * long / short)
    start = (scaled - side) // 2
    if scaled * side <= MAX_CANVAS_PIXELS:
        width, height = (scaled, side) if width >= height else (side, scaled)
        left, top = (start, 0) if width >= height else (0, start)
        return resize(image, width, height, resample).crop((left, top, left + side, top + side))
    seen = range(start, start + side)
    first, last = _seen(long, scaled, seen, resample)
    if width >= height:
        part = image.crop((first, 0, last, height))
        columns = _resample_lines(_columns(part), long, first, scaled, seen, resample)
        return _from_columns(columns, part).resize((side, side), resample)
    part = image.crop((0, first, width, last))
    if not vertical_first((height, width), (scaled, side)):
        part = part.resize((side, last - first), resample)
    part = _from_rows(_resample_lines(_rows(part), long, first, scaled, seen, resample), part)
    return part.resize((side, side), resample)


def cut_into_tiles(image: Image.Image, target_hw: tuple[int, int], side: int, resample: int) -> list[Image.Image]:
    """Return the AnyRes views: the whole image squeezed to (side, side), then its tiles in reading order.

    For the tiles the image is scaled to fit into `target_hw` and centred on a black canvas.
    """
    target_h, target_w = target_hw
    height, width = fitted_size((image.height, image.width), target_hw)
    canvas = Image.new(image.mode, (target_w, target_h))
    canvas.paste(resize(image, width, height, resample), ((target_w - width) // 2, (target_h - height) // 2))
    tiles = [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, target_h, side)
        for left in range(0, target_w, side)
    ]
    return [resize(image, side, side, resample), *tiles]


def _rows(image: Image.Image) -> np.ndarray:
    """(height, width x channels) bytes."""
    return np.asarray(image).reshape(image.height, -1)


def _columns(image: Image.Image) -> np.ndarray:
    """(width, height x channels) bytes."""
    return _rows(image.transpose(_TRANSPOSE))


def _from_rows(rows: np.ndarray, like: Image.Image) -> Image.Image:
    return Image.frombytes(like.mode, (like.width, len(rows)), rows.tobytes())


def _from_columns(columns: np.ndarray, like: Image.Image) -> Image.Image:
    return Image.frombytes(like.mode, (like.height, len(columns)), columns.tobytes()).transpose(_TRANSPOSE)


def _cubic(x: np.ndarray) -> np.ndarray:
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(x), 0.0)


_FILTERS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    _Resampling.BICUBIC: (_cubic, 2.0),
    _Resampling.BILINEAR: (_triangle, 1.0),
}


def _filter(resample: int) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Return a filter's weight as a function of the distance, and its support."""
    if resample not in _FILTERS:
        known = ", ".join(_Resampling(kind).name for kind in _FILTERS)
        raise ValueError(
            f"resample is {_Resampling(resample).name}; an image this long and narrow needs one of {known}. "
            "Crop it, or leave resample at BICUBIC."
        )
    return _FILTERS[resample]


def _window(position: int, in_size: int, out_size: int, resample: int) -> tuple[int, int]:
    """Return the inputs [first, last) of output `position` of a line resampled from `in_size` to `out_size`."""
    scale = in_size / out_size
    reach = _filter(resample)[1] * max(scale, 1.0)
    centre = (position + 0.5) * scale
    return max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), in_size)


def _touched(in_size: int, out_size: int, offset: int, length: int, resample: int) -> tuple[int, int]:
    """Return the outputs [first, last) that depend on inputs [offset, offset + length), possibly a few more."""
    scale = in_size / out_size
    margin = math.ceil(2 * max(scale, 1.0) / scale) + 1
    first = max(int(offset / scale) - margin, 0)
    last = min(int((offset + length) / scale) + margin + 1, out_size)
    return first, last


def _seen(in_size: int, out_size: int, wanted: range, resample: int) -> tuple[int, int]:
    """Return the inputs [first, last) of the outputs `wanted`."""
    return _window(wanted[0], in_size, out_size, resample)[0], _window(wanted[-1], in_size, out_size, resample)[1]


def _resample_lines(
    lines: np.ndarray, in_size: int, offset: int, out_size: int, wanted: range, resample: int
) -> np.ndarray:
    """Resample a virtual array of `in_size` lines along its first axis, as Pillow does; it is black except for `lines`.

    Args:
        lines: (length, n) bytes at positions [offset, offset + length).
        wanted: the outputs to compute, out of `out_size`.

    Returns:
        (len(wanted), n) bytes.
    """
    length, columns = lines.shape
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    kernel, _ = _filter(resample)
    passes = []
    for row, position in enumerate(wanted):
        first, last = _window(position, in_size, out_size, resample)
        centre = (position + 0.5) * scale
        weights = kernel((np.arange(last - first) + first - centre + 0.5) * (1.0 / stretch))
        # Pillow adds the weights up one by one; numpy's sum would round differently.
        total = np.add.accumulate(weights)[-1]
        fixed = np.trunc(weights / total * (1 << _FRACTION_BITS) + np.where(weights < 0, -0.5, 0.5))
        start, stop = max(first, offset), min(last, offset + length)
        if start < stop:
            passes.append((row, start - offset, stop - offset, fixed[start - first : stop - first]))

    result = np.zeros((len(wanted), columns), np.uint8)
    step = max(_BLOCK // length, _MIN_BLOCK_WIDTH)
    for at in range(0, columns, step):
        block = lines[:, at : at + step].astype(np.float64)
        for row, start, stop, fixed in passes:
            # Sums stay far below 2^53, so they are exact integers in any order of summation.
            value = fixed @ block[start:stop] + (1 << (_FRACTION_BITS - 1))
            result[row, at : at + step] = np.clip(np.floor(value / (1 << _FRACTION_BITS)), 0, 255)
    return result
