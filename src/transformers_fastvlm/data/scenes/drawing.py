# SPDX-License-Identifier: Apache-2.0
"""Draws shapes, text and bars on a canvas whose unit is a pixel of the model's own 256 x 256 input.

Everything is drawn with Pillow and its built-in fonts, so that a scene is the same on every machine: its scalable font,
upright, bold, slanted, narrow or wide; its bitmap font, enlarged; and seven-segment digits drawn here.
"""

import functools
import itertools
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 205, 40),
    "purple": (150, 50, 180),
    "orange": (245, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "star")
FACES = ("sans", "bold", "slanted", "narrow", "wide", "bitmap")
DIGIT_FACES = (*FACES, "segments")

# The lit segments of each digit: top, upper left, upper right, middle, lower left, lower right, bottom.
_SEGMENTS = (
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
)

Point = tuple[float, float]
Color = tuple[int, int, int]


class Canvas:
    """An image that is drawn in units of 1/256 of its longer side.

    Args:
        width, height: size in units; the larger one is 256.
        pixels: the longer side in pixels.
        background: RGB, 0 to 255.
    """

    def __init__(self, width: int, height: int, pixels: int, background: Color) -> None:
        self.width, self.height = width, height
        self.scale = pixels / max(width, height)
        size = (max(1, round(width * self.scale)), max(1, round(height * self.scale)))
        self.image = Image.new("RGB", size, background)
        self._draw = ImageDraw.Draw(self.image)

    def _scaled(self, points: list[Point]) -> list[Point]:
        return [(x * self.scale, y * self.scale) for x, y in points]

    def polygon(self, points: list[Point], color: Color) -> None:
        """Fill a polygon."""
        self._draw.polygon(self._scaled(points), fill=color)

    def rectangle(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        """Fill a rectangle."""
        self._draw.rectangle([value * self.scale for value in (left, top, right, bottom)], fill=color)

    def line(self, start: Point, end: Point, color: Color, width: float = 1.0) -> None:
        """Draw a straight line."""
        self._draw.line(self._scaled([start, end]), fill=color, width=max(1, round(width * self.scale)))

    def shape(self, name: str, x: float, y: float, radius: float, color: Color, turn: float = 0.0) -> None:
        """Fill one of SHAPES around (x, y), turned by `turn` radians."""
        if name == "circle":
            box = [value * self.scale for value in (x - radius, y - radius, x + radius, y + radius)]
            self._draw.ellipse(box, fill=color)
            return
        radii = {
            "square": [radius * 1.15] * 4,
            "triangle": [radius * 1.2] * 3,
            "star": [radius * 1.25, radius * 0.5] * 5,
        }
        corners = radii[name]
        start = turn + (math.pi / 4 if name == "square" else -math.pi / 2)
        step = 2 * math.pi / len(corners)
        self.polygon(
            [(x + r * math.cos(start + i * step), y + r * math.sin(start + i * step)) for i, r in enumerate(corners)],
            color,
        )

    def text(self, text: str, x: float, y: float, width: float, height: float, face: str, color: Color) -> list[float]:
        """Write `text` centred on (x, y), as large as fits into `width` x `height`; return each letter's middle."""
        mask = _glyphs(text, face)
        stretch = {"narrow": 0.75, "wide": 1.3}.get(face, 1.0)
        factor = min(width / (mask.width * stretch), height / mask.height) * self.scale
        size = (max(1, round(mask.width * stretch * factor)), max(1, round(mask.height * factor)))
        resample = Image.Resampling.NEAREST if face == "bitmap" else Image.Resampling.BILINEAR
        mask = mask.resize(size, resample, reducing_gap=2.0 if face != "bitmap" else None)
        corner = (round(x * self.scale - size[0] / 2), round(y * self.scale - size[1] / 2))
        self.image.paste(color, (*corner, corner[0] + size[0], corner[1] + size[1]), mask)
        return [x + (share - 0.5) * size[0] / self.scale for share in _middles(text, face)]

    def finish(self, rng: random.Random, noise: float, blur: float) -> Image.Image:
        """Return the image with a slight blur (radius in units) and Gaussian noise (standard deviation in levels)."""
        if blur:
            self.image = self.image.filter(ImageFilter.GaussianBlur(blur * self.scale))
        if not noise:
            return self.image
        array = np.asarray(self.image, dtype=np.float32)
        generator = np.random.Generator(np.random.SFC64(rng.getrandbits(64)))
        array = array + noise * generator.standard_normal((*array.shape[:2], 1), dtype=np.float32)
        return Image.fromarray(np.clip(np.rint(array), 0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=4096)
def _glyphs(text: str, face: str) -> Image.Image:
    """Return a mask (mode L, cropped to the ink) of `text`."""
    if face == "segments":
        return _segment_digits(text)
    font = _font(face)
    stroke = 3 if face == "bold" else 0
    left, top, right, bottom = font.getbbox(text, stroke_width=stroke)
    mask = Image.new("L", (math.ceil(right - left) + 4, math.ceil(bottom - top) + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, fill=255, font=font, stroke_width=stroke)
    if face == "slanted":
        shift = 0.25 * mask.height
        wide = (mask.width + math.ceil(shift), mask.height)
        mask = mask.transform(wide, Image.Transform.AFFINE, (1, 0.25, -shift, 0, 1, 0), Image.Resampling.BILINEAR)
    return mask.crop(mask.getbbox())


def _middles(text: str, face: str) -> list[float]:
    """Return the centre of each letter on the line, as a fraction of the text's width."""
    if face == "segments":
        return [(index + 0.5) / len(text) for index in range(len(text))]
    ends = [_font(face).getlength(text[:index]) for index in range(len(text) + 1)]
    return [(start + end) / 2 / ends[-1] for start, end in itertools.pairwise(ends)]


@functools.lru_cache
def _font(face: str) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default_imagefont() if face == "bitmap" else ImageFont.load_default(64)


def _segment_digits(text: str) -> Image.Image:
    """Return a mask of digits as a calculator shows them."""
    width, height, bar, gap = 36, 64, 8, 14
    mask = Image.new("L", ((width + gap) * len(text) - gap, height))
    draw = ImageDraw.Draw(mask)
    half = height // 2
    for index, digit in enumerate(text):
        x = index * (width + gap)
        boxes = (
            (x, 0, x + width, bar),
            (x, 0, x + bar, half),
            (x + width - bar, 0, x + width, half),
            (x, half - bar // 2, x + width, half + bar // 2),
            (x, half, x + bar, height),
            (x + width - bar, half, x + width, height),
            (x, height - bar, x + width, height),
        )
        for box, lit in zip(boxes, _SEGMENTS[int(digit)], strict=True):
            if lit == "1":
                draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    return mask
