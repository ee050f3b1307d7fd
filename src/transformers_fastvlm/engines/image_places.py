# SPDX-License-Identifier: Apache-2.0
"""Where the images of a question stand in its text: one rule for the tools that take text and images apart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..tokens import IMAGE_TOKEN

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LITERAL", "place_images"]

LITERAL = f"< {IMAGE_TOKEN.strip('<>')} >"
"""How `<image>` is written where no image is meant: to the model the token itself is always an image."""


def place_images(text: str, images: "Sequence[Image]") -> list[dict[str, Any]]:
    """Return the parts of a user's message: the images where the text says <image>, or first where it never does.

    Raises:
        ValueError: the text says it, but not once for each image.
    """
    shown = [{"type": "image", "image": image} for image in images]
    if IMAGE_TOKEN not in text:
        return [*shown, {"type": "text", "text": text}]
    first, *rest = text.split(IMAGE_TOKEN)
    if len(rest) != len(images):
        raise ValueError(
            f"the question has {len(rest)} {IMAGE_TOKEN}, but there {'is' if len(images) == 1 else 'are'} "
            f"{len(images)} image{'' if len(images) == 1 else 's'}. Write it once for each image, or leave it out to "
            f"put the images first; if it is meant literally, write {LITERAL}."
        )
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for image, words in zip(shown, rest, strict=True):
        parts += [image, {"type": "text", "text": words}]
    return [part for part in parts if part.get("text") != ""]
