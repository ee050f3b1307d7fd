# SPDX-License-Identifier: Apache-2.0
"""An image processor that prepares each picture once, for conversations that bring the same pictures again."""

import hashlib
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

__all__ = ["ImageMemory"]

_COLOURS_ELSEWHERE = ("P", "PA")  # modes whose bytes are numbers of colours in a palette


class ImageMemory:
    """Stands in for an image processor and hands out again what it made of a picture with the same pixels.

    Pictures are compared by a digest of their pixels, so one that was drawn on meanwhile is prepared anew. Pillow
    pictures are remembered; anything else (arrays, pictures with a palette) is prepared every time.

    Args:
        image_processor: the one to ask; every other attribute is its own.
        remembered: what was made so far, oldest first, shared between calls.
        max_images: how many pictures to keep.
    """

    def __init__(self, image_processor: Any, remembered: dict[Any, dict[str, Any]], max_images: int) -> None:
        self._image_processor, self._remembered, self._max_images = image_processor, remembered, max_images

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copying and pickling ask for before there is an image processor to ask
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._image_processor, name)

    def __call__(self, images: list[Any], **options: Any) -> BatchFeature:
        """Return what the image processor returns for this flat list of pictures."""
        if options.get("return_tensors") != "pt" or not all(_has_digest(image) for image in images):
            return self._image_processor(images, **options)
        settings = (self._image_processor.to_json_string(), repr(sorted(options.items())))
        keys = [(_digest(image), settings) for image in images]
        unknown = {key: image for key, image in zip(keys, images, strict=True) if key not in self._remembered}
        if unknown:
            made = self._image_processor(list(unknown.values()), **options)
            self._remembered.update(zip(unknown, _one_by_one(made), strict=True))
        parts = {key: self._remembered.pop(key) for key in dict.fromkeys(keys)}
        if len({part["pixel_values"].shape[1:] for part in parts.values()}) > 1:
            return self._image_processor(images, **options)  # which says what is wrong with that
        self._remembered.update(parts)  # now the newest
        for key in list(self._remembered)[: -max(self._max_images, len(parts))]:
            del self._remembered[key]
        names = parts[keys[0]]
        return BatchFeature({name: torch.cat([parts[key][name] for key in keys]) for name in names})


def _has_digest(image: Any) -> bool:
    return isinstance(image, Image.Image) and image.mode not in _COLOURS_ELSEWHERE


def _digest(image: Image.Image) -> tuple[Any, ...]:
    exif = image.info.get("exif")  # may turn the picture
    return image.mode, image.size, exif, hashlib.sha256(image.tobytes()).digest()


def _one_by_one(features: BatchFeature) -> list[dict[str, Any]]:
    """Split what was made of several pictures; with AnyRes each has several tiles."""
    pixels = features["pixel_values"]
    tiles = pixels.split(features["num_tiles"].tolist()) if "num_tiles" in features else pixels.split(1)
    others = [name for name in features if name != "pixel_values"]
    return [
        {"pixel_values": tile.clone(), **{name: features[name][index : index + 1] for name in others}}
        for index, tile in enumerate(tiles)
    ]
