# SPDX-License-Identifier: Apache-2.0
"""How images are read: what every tool hands through to where an image is opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import ImageColor

__all__ = ["WHITE", "Colour", "ReadOptions", "as_colour"]

WHITE = (255, 255, 255)

Colour: TypeAlias = str | Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How images are read.

    Args:
        do_exif_transpose: turn them as their EXIF orientation says; False for their pixels as they are stored.
        alpha_background: colour that transparent images are laid on, by name, as #rrggbb or as (red, green, blue);
            None or "none" drops the transparency, as Apple's code does, which shows what was hidden.
        max_pixels: of an image; None for `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        ValueError: no such colour.
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
        """The colour's red, green and blue, 0 to 255."""
        return as_colour(self.alpha_background)


def as_colour(colour: Colour) -> tuple[int, int, int] | None:
    """Return a colour's red, green and blue, 0 to 255; None for None and "none".

    Raises:
        ValueError: no such colour.
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
