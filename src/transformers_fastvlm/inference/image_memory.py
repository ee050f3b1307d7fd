# SPDX-License-Identifier: Apache-2.0
"""An image processor that prepares each image once, for conversations that repeat the same images."""

import hashlib
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

__all__ = ["ImageMemory"]

_COLOURS_ELSEWHERE = ("P", "PA")  # modes whose bytes are indices into a palette


class ImageMemory:
    """Wraps an image processor and reuses its output for images with the same pixels.

    Images are compared by a digest of their pixels, so an image that was changed is prepared again. Only Pillow images
    are cached; others (arrays, images with a palette) are prepared every time.

    Args:
        image_processor: the wrapped processor; other attributes are read from it.
        remembered: earlier outputs, oldest first, shared between calls.
        max_images: number of images to keep.
    """

    def __init__(self, image_processor: Any, remembered: dict[Any, dict[str, Any]], max_images: int) -> None:
        self._image_processor, self._remembered, self._max_images = image_processor, remembered, max_images

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling read these before the image processor is set
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._image_processor, name)

    def __call__(self, images: list[Any], **options: Any) -> BatchFeature:
        """Return the image processor's output for this flat list of images."""
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
            return self._image_processor(images, **options)  # raises, and explains the mismatch
        self._remembered.update(parts)  # now the newest
        for key in list(self._remembered)[: -max(self._max_images, len(parts))]:
            del self._remembered[key]
        names = parts[keys[0]]
        return BatchFeature({name: torch.cat([parts[key][name] for key in keys]) for name in names})


def _has_digest(image: Any) -> bool:
    return isinstance(image, Image.Image) and image.mode not in _COLOURS_ELSEWHERE


def _digest(image: Image.Image) -> tuple[Any, ...]:
    exif = image.info.get("exif")  # may rotate the image
    return image.mode, image.size, exif, hashlib.sha256(image.tobytes()).digest()


def _one_by_one(features: BatchFeature) -> list[dict[str, Any]]:
    """Split the output for several images; with AnyRes each has several tiles."""
    pixels = features["pixel_values"]
    tiles = pixels.split(features["num_tiles"].tolist()) if "num_tiles" in features else pixels.split(1)
    others = [name for name in features if name != "pixel_values"]
    return [
        {"pixel_values": tile.clone(), **{name: features[name][index : index + 1] for name in others}}
        for index, tile in enumerate(tiles)
    ]
