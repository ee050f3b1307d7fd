# SPDX-License-Identifier: Apache-2.0
"""The three ways a picture becomes square tiles, with Pillow's 8-bit resampling, and the same for extreme shapes.

Padding a panorama to a square, or scaling its short side up before a centre crop, can ask for a canvas of 10^10
pixels of which little is seen. Pillow resamples one axis after the other, rounding to bytes in between, so a result
follows from two one-axis passes; here the pass along the oversized axis computes only the part that is seen. Its
weights are Pillow's, to the bit: fixed-point with 22 fractional bits, applied in exact integer arithmetic.

Sources: LLaVA's and Apple's preprocessing (what is padded, cropped and rounded where); Pillow's documentation of its
resampling filters; Keys, *Cubic convolution interpolation for digital image processing*, 1981 (a = -0.5).
"""

import math

import numpy as np
from PIL import Image

from .anyres import fitted_size

MAX_CANVAS_PIXELS = 2**26
"""Intermediate canvases of more pixels than this are never made."""

_FRACTION_BITS = 22
_BLOCK = 2**22
_Resampling = Image.Resampling


def pad_to_square(image: Image.Image, side: int, resample: int) -> Image.Image:
    """Centre `image` on a black square of its longer side, then scale that to (side, side)."""
    width, height = image.size
    long = max(width, height)
    if width == height:
        return image.resize((side, side), resample)
    left, top = (long - width) // 2, (long - height) // 2
    if long * long <= MAX_CANVAS_PIXELS:
        canvas = Image.new(image.mode, (long, long))
        canvas.paste(image, (left, top))
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


def crop_to_square(image: Image.Image, side: int, resample: int) -> Image.Image:
    """Scale the shorter side of `image` to `side`, then cut the centre (side, side)."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    scaled = int(side * long / short)
    start = (scaled - side) // 2
    if scaled * side <= MAX_CANVAS_PIXELS:
        size = (scaled, side) if width >= height else (side, scaled)
        left, top = (start, 0) if width >= height else (0, start)
        return image.resize(size, resample).crop((left, top, left + side, top + side))
    seen = range(start, start + side)
    first, last = _seen(long, scaled, seen, resample)
    if width >= height:
        part = image.crop((first, 0, last, height))
        columns = _resample_lines(_columns(part), long, first, scaled, seen, resample)
        return _from_columns(columns, part).resize((side, side), resample)
    part = image.crop((0, first, width, last)).resize((side, last - first), resample)
    return _from_rows(_resample_lines(_rows(part), long, first, scaled, seen, resample), part)


def cut_into_tiles(image: Image.Image, target_hw: tuple[int, int], side: int, resample: int) -> list[Image.Image]:
    """Return the AnyRes views: the whole image squeezed to (side, side), then its tiles at `target_hw` in reading order.

    The image is scaled to fit into `target_hw` and centred on black.
    """
    target_h, target_w = target_hw
    height, width = fitted_size((image.height, image.width), target_hw)
    canvas = Image.new(image.mode, (target_w, target_h))
    canvas.paste(image.resize((width, height), resample), ((target_w - width) // 2, (target_h - height) // 2))
    tiles = [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, target_h, side)
        for left in range(0, target_w, side)
    ]
    return [image.resize((side, side), resample), *tiles]


def _rows(image: Image.Image) -> np.ndarray:
    """(height, width x channels) bytes."""
    return np.asarray(image).reshape(image.height, -1)


def _columns(image: Image.Image) -> np.ndarray:
    """(width, height x channels) bytes."""
    return np.ascontiguousarray(np.asarray(image).swapaxes(0, 1)).reshape(image.width, -1)


def _from_rows(rows: np.ndarray, like: Image.Image) -> Image.Image:
    return Image.frombytes(like.mode, (like.width, len(rows)), rows.tobytes())


def _from_columns(columns: np.ndarray, like: Image.Image) -> Image.Image:
    pixels = columns.reshape(len(columns), like.height, -1).swapaxes(0, 1)
    return Image.frombytes(like.mode, (len(columns), like.height), np.ascontiguousarray(pixels).tobytes())


def _cubic(x: np.ndarray) -> np.ndarray:
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(x), 0.0)


_FILTERS = {_Resampling.BICUBIC: (_cubic, 2.0), _Resampling.BILINEAR: (_triangle, 1.0)}


def _window(position: int, in_size: int, out_size: int, resample: int) -> tuple[int, int]:
    """The inputs [first, last) that output `position` of a line resampled from `in_size` to `out_size` is made of."""
    if resample not in _FILTERS:
        known = ", ".join(kind.name for kind in _FILTERS)
        raise ValueError(
            f"resample is {_Resampling(resample).name}; an image this long and narrow needs one of {known}. "
            "Crop it, or leave resample at BICUBIC."
        )
    scale = in_size / out_size
    reach = _FILTERS[_Resampling(resample)][1] * max(scale, 1.0)
    centre = (position + 0.5) * scale
    return max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), in_size)


def _touched(in_size: int, out_size: int, offset: int, length: int, resample: int) -> tuple[int, int]:
    """The outputs [first, last) that inputs [offset, offset + length) can reach, possibly a few more."""
    scale = in_size / out_size
    margin = math.ceil(2 * max(scale, 1.0) / scale) + 1
    first = max(int(offset / scale) - margin, 0)
    last = min(int((offset + length) / scale) + margin + 1, out_size)
    return first, last


def _seen(in_size: int, out_size: int, wanted: range, resample: int) -> tuple[int, int]:
    """The inputs [first, last) that the outputs `wanted` are made of."""
    return _window(wanted[0], in_size, out_size, resample)[0], _window(wanted[-1], in_size, out_size, resample)[1]


def _resample_lines(
    lines: np.ndarray, in_size: int, offset: int, out_size: int, wanted: range, resample: int
) -> np.ndarray:
    """Resample along the first axis, as Pillow does, a virtual array of `in_size` lines that is black but for `lines`.

    Args:
        lines: (length, n) bytes, which stand at [offset, offset + length).
        wanted: the outputs to compute, of `out_size`.

    Returns:
        (len(wanted), n) bytes.
    """
    length, columns = lines.shape
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    result = np.zeros((len(wanted), columns), np.uint8)
    for row, position in enumerate(wanted):
        first, last = _window(position, in_size, out_size, resample)
        centre = (position + 0.5) * scale
        kernel = _FILTERS[_Resampling(resample)][0]
        weights = kernel((np.arange(last - first) + first - centre + 0.5) * (1.0 / stretch))
        # Pillow adds the weights up one by one; numpy's sum would round differently.
        total = np.add.accumulate(weights)[-1]
        fixed = np.trunc(weights / total * (1 << _FRACTION_BITS) + np.where(weights < 0, -0.5, 0.5))
        start, stop = max(first, offset), min(last, offset + length)
        if start >= stop:
            continue
        fixed = fixed[start - first : stop - first]
        step = max(_BLOCK // len(fixed), 1)
        for at in range(0, columns, step):
            block = lines[start - offset : stop - offset, at : at + step]
            # Sums stay far below 2^53, so float64 products are exact integers in any order of summation.
            value = fixed @ block.astype(np.float64) + (1 << (_FRACTION_BITS - 1))
            result[row, at : at + step] = np.clip(np.floor(value / (1 << _FRACTION_BITS)), 0, 255)
    return result
