# SPDX-License-Identifier: Apache-2.0
"""Virtual token ids for images, so that prompts with images become plain lists of token ids.

Transformers' continuous batching takes token ids only. So each image token gets a virtual id above the vocabulary, and
`ImageTable.embed` looks up the image's features instead of a row of the embedding.
"""

import math
import threading
from collections import OrderedDict
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

__all__ = ["ImageTable", "StoredImage"]

FIRST_ID = 1 << 20
"""The first virtual id; no vocabulary is that large."""

LAST_ID = 2**31 - 1
"""The last one: Transformers' continuous batching keeps token ids in 32 bits."""

SLOT = 256
"""Ids are assigned in slots of this size: the tokens of an image of 1024 x 1024 pixels."""

KEPT_TOKENS = 64 * SLOT
"""Number of tokens of recent images whose features are kept after their last prompt."""


class _Model(Protocol):
    device: torch.device

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> Any: ...


class StoredImage:
    """An image: its pixel values until it is encoded, its features afterwards.

    Attributes:
        ids: the virtual id of each of its tokens.
        inputs: arguments of `get_image_features` for this image alone; empty after it is encoded.
        features: (tokens, hidden_size); None before.
    """

    def __init__(self, ids: range, inputs: dict[str, Tensor]) -> None:
        self.ids, self.inputs = ids, inputs
        self.features: Tensor | None = None
        self._counted = False

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors now."""
        return sum(one.nbytes for one in (*self.inputs.values(), self.features) if one is not None)

    @property
    def encoded(self) -> bool:
        """Whether its features are there."""
        return self.features is not None

    @property
    def kind(self) -> tuple[str, ...]:
        """Names of its inputs; only images of one kind can be encoded together."""
        return tuple(self.inputs)

    @property
    def pixels(self) -> int:
        """Number of pixels to encode."""
        return self.inputs["pixel_values"][:, 0].numel() if self.inputs else 0

    def count_once(self) -> bool:
        """Return whether this is the first call: the encoding counts for the first prompt with the image."""
        self._counted, before = True, self._counted
        return not before


class ImageTable:
    """Gives images virtual ids, and keeps their features as long as a prompt or a recent question needs them.

    An image is kept as long as its `StoredImage` is referenced; the most recent images are kept in addition. Equal
    images have equal ids, so that prompts with the same beginning share keys and values. Different images have
    different ids until all ids are used up. Then `rounds` grows and ids are reused: a cache of keys and values by
    token ids must be dropped before it gets prompts of the new round. Thread-safe.

    Args:
        kept_tokens: see `KEPT_TOKENS`.
        last_id: see `LAST_ID`.

    Attributes:
        rounds: how often the ids were used up.
    """

    def __init__(self, kept_tokens: int = KEPT_TOKENS, last_id: int = LAST_ID) -> None:
        self._kept_tokens, self._slots = kept_tokens, (last_id + 1 - FIRST_ID) // SLOT
        self._lock = threading.Lock()
        self._by_key: WeakValueDictionary[bytes, StoredImage] = WeakValueDictionary()
        self._by_slot: WeakValueDictionary[int, StoredImage] = WeakValueDictionary()
        self._recent: OrderedDict[StoredImage, None] = OrderedDict()
        self._next = 0
        self.rounds = 0

    def find(self, key: bytes) -> StoredImage | None:
        """Return the image of this key, or None.

        Args:
            key: digest of the image's content.
        """
        with self._lock:
            image = self._by_key.get(key)
            if image is not None:
                self._keep(image)
            return image

    def add(self, key: bytes, tokens: int, inputs: dict[str, Tensor]) -> StoredImage:
        """Store an image that is not encoded yet; return it, or the one that has this key already.

        Args:
            key: digest of the image's content.
            tokens: number of its tokens, at least 1.
            inputs: arguments of `get_image_features` for this image alone.

        Raises:
            ValueError: more images are in use than there are ids.
        """
        with self._lock:
            image = self._by_key.get(key)
            if image is None:
                count = math.ceil(tokens / SLOT)
                slot = self._free_slots(count)
                start = FIRST_ID + slot * SLOT
                image = self._by_key[key] = StoredImage(range(start, start + tokens), inputs)
                self._by_slot.update(dict.fromkeys(range(slot, slot + count), image))
            self._keep(image)
            return image

    @torch.no_grad()
    def encode(self, model: _Model, images: list[StoredImage]) -> None:
        """Encode images together, except those that are already encoded.

        Args:
            model: a `FastVLMForConditionalGeneration`.
            images: of one `kind`.
        """
        images = [image for image in dict.fromkeys(images) if image.features is None]
        if not images:
            return
        inputs = {
            name: torch.cat([image.inputs[name] for image in images]).to(model.device) for name in images[0].inputs
        }
        features = model.get_image_features(**inputs, return_dict=True).pooler_output
        for image, own in zip(images, features, strict=True):
            if len(own) != len(image.ids):
                raise ValueError(f"an image has {len(own)} features; expected {len(image.ids)}.")
            image.features = own
        for image in images:
            image.inputs = {}

    def embed(self, input_ids: Tensor, embedding: nn.Module) -> Tensor:
        """Return embeddings (1, length, hidden_size) of token ids (1, length), those of encoded images included."""
        virtual = input_ids >= FIRST_ID
        embeds: Tensor = embedding(input_ids.masked_fill(virtual, 0))
        places = virtual[0].nonzero()[:, 0]
        rows = input_ids[0, places].long() - FIRST_ID
        slots = rows // SLOT
        for slot in slots.unique_consecutive().tolist():
            image, own = self._by_slot[slot], slots == slot
            if image.features is None:
                raise RuntimeError("a prompt has an image that is not encoded.")
            first = image.ids.start - FIRST_ID
            embeds[0, places[own]] = image.features[rows[own] - first].to(embeds)
        return embeds

    def _free_slots(self, count: int) -> int:
        """Return the first of `count` neighbouring free slots, and continue the search after them next time."""
        first, tried = self._next, 0
        while True:
            if first + count > self._slots:
                first, tried = 0, tried + 1
                self.rounds += 1
                if tried > 1:
                    raise ValueError(
                        f"{len(self._by_slot)} of {self._slots} slots of image ids are in use; use fewer images."
                    )
            taken = next((slot for slot in range(first, first + count) if slot in self._by_slot), None)
            if taken is None:
                self._next = first + count
                return first
            first = taken + 1

    def _keep(self, image: StoredImage) -> None:
        self._recent[image] = None
        self._recent.move_to_end(image)
        while len(self._recent) > 1 and sum(len(one.ids) for one in self._recent) > self._kept_tokens:
            self._recent.popitem(last=False)
