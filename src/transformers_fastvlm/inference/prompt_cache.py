# SPDX-License-Identifier: Apache-2.0
"""Several questions about the same images: the common beginning of consecutive prompts is computed once."""

import copy
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .. import compat
from .image_memory import ImageMemory

__all__ = ["PromptCache"]

_ASSISTED = "assisted decoding runs the whole prompt through the model, including cached tokens. Call model.generate."
_NOT_TAKEN = {
    **dict.fromkeys(compat.CACHE_NAMES, "PromptCache has its own cache. Omit it, or call model.generate."),
    "mm_encoder_outputs": "PromptCache compares images. Pass pixel_values or image_features.",
    "inputs_embeds": "embeddings cannot be compared with an earlier prompt. Pass input_ids.",
    "cache_implementation": "only a dynamic cache can be cropped to a common beginning. Omit it, or call "
    "model.generate, which prefills the whole prompt.",
    "assistant_model": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
}


@dataclass(eq=False)
class _CachedImage:
    """An image and its features.

    Attributes:
        pixels: (tiles, channels, height, width); one tile without AnyRes.
        size: with AnyRes, height and width before tiling.
        key: identifies each of its tokens in a prompt; below 0, so that it differs from all token ids.
        features: (tokens, hidden_size).
    """

    pixels: Tensor
    size: list[int] | None
    key: int
    features: Tensor = field(default_factory=lambda: torch.empty(0))

    def is_of(self, pixels: Tensor, size: list[int] | None) -> bool:
        mine = self.pixels
        alike = (mine.shape, mine.dtype, mine.device) == (pixels.shape, pixels.dtype, pixels.device)
        return alike and self.size == size and torch.equal(mine, pixels)


class PromptCache:
    """Answers prompts one after the other, and reuses the prefix that a prompt shares with the last one.

    A second question about an image, in the same conversation or a new one, neither encodes the image nor prefills its
    tokens again. The common prefix is found by comparing tokens and pixels. Answers match a fresh run up to
    floating-point rounding: in half precision, two tokens with nearly equal scores may swap. Thread-safe: concurrent
    calls wait for each other.

    Features of images are kept after their prompt, so returning to an image needs no encoding. Call `reset` after any
    change of the model, such as new weights, another adapter, dtype or device.

    Args:
        model: `FastVLMForConditionalGeneration`, also with adapters or quantized.
        processor: its `FastVLMProcessor`.
        max_images: number of images to keep besides those of the last prompt, at least 1.

    Attributes:
        reused_tokens: tokens of the last prompt that were in the cache.
        prefilled_tokens: tokens of the last prompt that were not in the cache.
        encoded_images: images of the last prompt that had to be encoded.

    Raises:
        ValueError: `max_images` below 1.

    Example:
        >>> cache = PromptCache(model, processor)  # doctest: +SKIP
        >>> content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]  # doctest: +SKIP
        >>> cache.answer([{"role": "user", "content": content}], max_new_tokens=64)  # doctest: +SKIP
    """

    def __init__(self, model: Any, processor: Any, max_images: int = 8) -> None:
        if max_images < 1:
            raise ValueError(f"max_images is {max_images}; expected 1 or more.")
        self.model, self.processor, self.max_images = model, processor, max_images
        self._next_key = itertools.count(-1, -1)
        self._answering, self._preparing = threading.RLock(), threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget all prompts and images."""
        with self._answering, self._preparing:
            self._processed: dict[Any, dict[str, Any]] = {}
            self._images: list[_CachedImage] = []
            self._forget_prompt()
            self.reused_tokens = self.prefilled_tokens = self.encoded_images = 0

    def _forget_prompt(self) -> None:
        # Created without a configuration, so that layers with a sliding window keep every token and can be cropped.
        self._cache = DynamicCache()
        self._keys: list[int] = []  # of each token in the cache: its id, or its image's key

    def answer(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Return the model's answer to a conversation.

        Args:
            messages: as for `FastVLMProcessor.apply_chat_template`; the last one is the user's.
            **options: of `generate`, such as `max_new_tokens` or `streamer`.

        Raises:
            ValueError: see `prepare` and `generate`; or `num_return_sequences` is above 1.
        """
        if (count := self._option("num_return_sequences", options) or 1) > 1:
            raise ValueError(f"num_return_sequences is {count}, but answer() returns one text; use generate().")
        inputs = self.prepare(messages)
        output = self.generate(**inputs, **options)
        sequences = output if isinstance(output, Tensor) else output.sequences
        new = sequences[0, inputs["input_ids"].shape[1] :]
        text: str = self.processor.decode(new, skip_special_tokens=True)
        return text.strip()

    def prepare(self, messages: list[dict[str, Any]]) -> BatchFeature:
        """Return the inputs of `generate` for a conversation, on the model's device.

        Like `apply_chat_template` of the processor; Pillow images are prepared only once.

        Raises:
            ValueError: see `FastVLMProcessor.apply_chat_template`.
        """
        processor = copy.copy(self.processor)
        with self._preparing:
            processor.image_processor = ImageMemory(processor.image_processor, self._processed, self.max_images)
            inputs: BatchFeature = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        return inputs.to(self.model.device)

    def process_images(self, images: list[Any], **options: Any) -> BatchFeature:
        """Return the image processor's output for a flat list of images; known images are prepared only once."""
        with self._preparing:
            return ImageMemory(self.processor.image_processor, self._processed, self.max_images)(images, **options)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        num_tiles: Tensor | None = None,
        image_features: Sequence[Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """Return what `model.generate` returns for the same arguments.

        Args:
            input_ids: (1, length), the whole prompt; or (rows, length) with identical rows, for several answers.
            attention_mask: of the same shape, all ones; or None.
            pixel_values, image_sizes, num_tiles: all images of the prompt, as returned by the processor.
            image_features: instead of pixel values, the features of all images, each (tokens, hidden_size). The same
                tensor means the same image.
            **options: of `model.generate`: sampling, beams, `streamer`, `max_new_tokens` and so on. The prompt is
                prefilled once, also with beams or several returned sequences.

        Raises:
            ValueError: rows that differ, padding, placeholders that do not match the images, or an option that
                PromptCache does not support.
        """
        with self._answering:
            self._check(input_ids, attention_mask, options)
            if image_features is None:
                images = self._remember(pixel_values, image_sizes, num_tiles)
            else:
                images = self._remember_features(image_features)
            return self._generate(input_ids, images, options)

    def _generate(self, input_ids: Tensor, images: list[_CachedImage], options: dict[str, Any]) -> Any:
        prompt, spans = self._keys_of(input_ids[0].tolist(), images)
        start = self._cut_back(prompt, spans)
        rest = [image for image, (first, _) in zip(images, spans, strict=True) if first >= start]
        self.reused_tokens, self.prefilled_tokens = start, len(prompt) - start
        encoded: dict[str, Any] = {}
        if rest:
            features = BaseModelOutputWithPooling(pooler_output=[image.features for image in rest])
            encoded = {"mm_encoder_outputs": {"image": features}}
        copies = max(self._option(name, options) or 1 for name in ("num_beams", "num_return_sequences"))
        copies *= len(input_ids)
        if copies > 1 and spans and spans[-1][1] == len(prompt):
            raise ValueError("The prompt ends in an image; beams need text after the last image. Add some.")
        mask = torch.ones_like(input_ids)
        options = _with_cache(options)
        try:
            if copies > 1:
                if len(prompt) - start > 1:
                    own = {"cache": self._cache, "use_cache": True, "logits_to_keep": 1}
                    self.model(input_ids=input_ids[:1, start:-1], attention_mask=mask[:1, :-1], **own, **encoded)
                encoded = {}
                self._cache.batch_repeat_interleave(copies)
            output = self.model.generate(
                input_ids=input_ids, attention_mask=mask, **{compat.CACHE: self._cache}, **encoded, **options
            )
        except BaseException:  # also keep the prompt of an interrupted answer
            self._keep_beginning(prompt)
            raise
        if copies > 1:
            self._keep_beginning(prompt)
        else:
            sequences = output if isinstance(output, Tensor) else output.sequences
            keys = prompt + sequences[0, len(prompt) :].tolist()
            self._keys = keys[: self._cache.get_seq_length()]  # the last token was not run through the model
        return output

    def _option(self, name: str, options: dict[str, Any]) -> Any:
        """Return an option of generate(): as given, or from the given generation_config, or from the model's."""
        configs = (options.get("generation_config"), self.model.generation_config)
        values = [options.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> None:
        if input_ids.ndim != 2 or not input_ids.numel() or not (input_ids == input_ids[:1]).all():
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; expected (1, length), or identical rows: "
                "PromptCache takes one prompt at a time. For a batch call model.generate."
            )
        if attention_mask is not None and (attention_mask.shape != input_ids.shape or not attention_mask.all()):
            raise ValueError(
                "attention_mask has another shape than input_ids, or zeros; expected a prompt without padding."
            )
        for name, why in _NOT_TAKEN.items():
            if self._option(name, options) is not None:
                raise ValueError(f"{name} is set, but {why}")
        if options.get("use_cache") is False:
            raise ValueError("use_cache is False, but PromptCache needs its cache. Call model.generate.")
        if compat.GENERATE_KEEPS_ENCODER_OUTPUTS and self._option("prefill_chunk_size", options) is not None:
            raise ValueError(
                "prefill_chunk_size is set, but Transformers before 5.20 would prefill cached tokens again. "
                "Upgrade, or omit it."
            )

    def _remember(
        self, pixel_values: Tensor | None, image_sizes: Tensor | None, num_tiles: Tensor | None
    ) -> list[_CachedImage]:
        """Return the prompt's images in order; encode the new ones."""
        self.encoded_images = 0
        if pixel_values is None:
            return []
        counts, sizes = None if num_tiles is None else num_tiles.tolist(), None
        if counts is None:
            views = pixel_values.split(1)
        elif image_sizes is not None and len(image_sizes) == len(counts) and sum(counts) == len(pixel_values):
            views, sizes = pixel_values.split(counts), image_sizes.tolist()
        if (counts is None) != (image_sizes is None) or (counts is not None and sizes is None):
            self.model.get_image_features(pixel_values, image_sizes, num_tiles)  # raises, and explains the mismatch
        found: list[_CachedImage] = []
        new: list[_CachedImage] = []
        for index, view in enumerate(views):
            size = None if sizes is None else sizes[index]
            image = next((one for one in (*self._images, *new) if one.is_of(view, size)), None)
            if image is None:
                image = _CachedImage(view.clone(), size, next(self._next_key))
                new.append(image)
            found.append(image)
        if new:
            tiled = {}
            if sizes is not None:
                tiled["image_sizes"] = torch.tensor([one.size for one in new], device=pixel_values.device)
                tiled["num_tiles"] = torch.tensor([len(one.pixels) for one in new], device=pixel_values.device)
            pixels = torch.cat([one.pixels for one in new])
            features = self.model.get_image_features(pixels, **tiled, return_dict=True).pooler_output
            for image, own in zip(new, features, strict=True):
                image.features = own
        self.encoded_images = len(new)
        others = [one for one in self._images if one not in found]
        self._images = [*others[-self.max_images :], *dict.fromkeys(found)]
        return found

    def _remember_features(self, image_features: Sequence[Tensor]) -> list[_CachedImage]:
        """Return the prompt's images in order, which are encoded already."""
        known = {id(image.features): image for image in self._images}
        for features in image_features:
            if id(features) not in known:
                known[id(features)] = _CachedImage(torch.empty(0), None, next(self._next_key), features)
        found = [known[id(features)] for features in image_features]
        others = [image for image in self._images if image not in found]
        self._images, self.encoded_images = [*others[-self.max_images :], *dict.fromkeys(found)], 0
        return found

    def _keys_of(self, tokens: list[int], images: list[_CachedImage]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a key for each token, and the span [first, end) of each image's tokens."""
        image_token_id = self.model.config.image_token_id
        placeholders = [index for index, token in enumerate(tokens) if token == image_token_id]
        expected = sum(len(image.features) for image in images)
        if len(placeholders) != expected:
            raise ValueError(
                f"input_ids has {len(placeholders)} <image> placeholders, but the {len(images)} images have {expected} "
                "features. Let the processor make both, with one <image> in the text for each image."
            )
        keys, spans, done = list(tokens), [], 0
        for image in images:
            own = placeholders[done : done + len(image.features)]
            for index in own:
                keys[index] = image.key
            spans.append((own[0], own[-1] + 1))
            done += len(own)
        return keys, spans

    def _cut_back(self, prompt: list[int], spans: list[tuple[int, int]]) -> int:
        """Crop the cache to its common beginning with `prompt`, never inside an image; return its length.

        The last token is never reused, since its logits are needed.
        """
        pairs = zip(self._keys, prompt[:-1], strict=False)
        length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        length = next((first for first, end in spans if first < length < end), length)
        if length:
            self._cache.crop(length - len(self._keys))
            self._keys = self._keys[:length]
        else:
            self._forget_prompt()
        return length

    def _keep_beginning(self, prompt: list[int]) -> None:
        """Crop the cache to one row and to the part of `prompt` in all layers, after beams or an interruption."""
        layers = self._cache.layers
        lengths = [min(layer.keys.shape[-2], layer.values.shape[-2]) for layer in layers if layer.is_initialized]
        length = min((*lengths, len(prompt)))
        if not length or len(lengths) < self.model.config.get_text_config().num_hidden_layers:
            self._forget_prompt()
            return
        for layer in layers:
            layer.keys, layer.values = layer.keys[:1, :, :length], layer.values[:1, :, :length]
        self._keys = prompt[:length]


def _with_cache(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of generate() with use_cache set: in a given generation_config, or else as a single option."""
    config = options.get("generation_config")
    if config is None:
        return options | {"use_cache": True}
    config = copy.deepcopy(config)
    config.use_cache = True
    return options | {"generation_config": config}
