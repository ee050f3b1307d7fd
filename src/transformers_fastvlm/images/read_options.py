# SPDX-License-Identifier: Apache-2.0
"""Options of reading images, which every tool passes to the function that opens an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import ImageColor

__all__ = ["WHITE", "Colour", "ReadOptions", "as_colour"]

WHITE = (255, 255, 255)

Colour: TypeAlias = str | Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options of reading images.

    Args:
        do_exif_transpose: apply the EXIF orientation; False keeps the pixels as stored.
        alpha_background: background colour for transparent images, by name, as #rrggbb or as (red, green, blue); None
            or "none" drops the transparency, as Apple's code does, and shows the colours beneath.
        max_pixels: maximum pixels of an image; None for `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        ValueError: an unknown colour, or `max_pixels` below 1.
    """

    do_exif_transpose: bool = True
    alpha_background: Colour = "white"
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha_background", as_colour(self.alpha_background))
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ValueError(f"max_pixels is {self.max_pixels}; expected 1 or more, or None.")

    @property
    def background(self) -> tuple[int, int, int] | None:
        """The background's red, green and blue, 0 to 255; None to drop transparency."""
        return as_colour(self.alpha_background)


def as_colour(colour: Colour) -> tuple[int, int, int] | None:
    """Return a colour's red, green and blue, 0 to 255; None for None and "none".

    Raises:
        ValueError: an unknown colour.
    """
    if colour is None or colour == "none":
        return None
    try:
        channels = ImageColor.getrgb(colour) if isinstance(colour, str) else tuple(colour)
    except (ValueError, TypeError):
        channels = ()
    if len(channels) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in channels):
        raise ValueError(
            f"alpha_background is {colour!r}; expected a colour such as 'white', '#ffffff' or (255, 255, 255), or "
            "'none' to drop the transparency."
        )
    return channels
