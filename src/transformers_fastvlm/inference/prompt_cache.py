# SPDX-License-Identifier: Apache-2.0
"""Several questions about the same pictures: what the last prompt and the next one begin with is computed once."""

import copy
import itertools
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .. import compat
from .image_memory import ImageMemory

__all__ = ["PromptCache"]

_ASSISTED = "assisted decoding runs the whole prompt through the model, also what is in the cache. Call model.generate."
_NOT_TAKEN = {
    **dict.fromkeys(compat.CACHE_NAMES, "PromptCache keeps its own cache. Leave it out, or call model.generate."),
    "mm_encoder_outputs": "PromptCache encodes the images itself. Pass pixel_values.",
    "inputs_embeds": "embeddings cannot be compared with an earlier prompt. Pass input_ids.",
    "cache_implementation": "only a dynamic cache can be cut back to a common beginning. Leave it out, or call "
    "model.generate, which prefills anew.",
    "assistant_model": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
}


@dataclass(eq=False)
class _Picture:
    """A picture and what the model made of it.

    Attributes:
        pixels: (tiles, channels, height, width); one tile without AnyRes.
        size: height and width before the picture was cut into tiles, with AnyRes.
        key: stands for each of its tokens in a prompt; below 0, so that no token has it.
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
    """Answers prompts one after the other, and computes only what the last prompt did not begin with.

    A second question about a picture, in the same conversation or in one of its own, neither encodes the picture nor
    runs its tokens through the language model again. Nothing has to be said about what is the same: tokens and pixels
    are compared. The answers are those of a fresh run, but that sums in another order differ in their last bits: in
    half precision two tokens of nearly the same score may change places. Several threads may ask; each waits for its
    turn.

    Features of pictures outlive the prompt they were in, so that going back to one costs no encoding. What changes
    the model, such as new weights, another adapter, type or device, makes all of it wrong: call `reset` then.

    Args:
        model: `FastVLMForConditionalGeneration`, also with adapters or quantized.
        processor: its `FastVLMProcessor`.
        max_images: pictures to remember beside those of the last prompt.

    Attributes:
        reused_tokens: of the last prompt, how many were in the cache.
        prefilled_tokens: of the last prompt, how many were not.
        encoded_images: how many of the last prompt's pictures had to be encoded.

    Raises:
        ValueError: `max_images` below 1.

    Example:
        >>> cache = PromptCache(model, processor)  # doctest: +SKIP
        >>> content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]  # doctest: +SKIP
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
        """Forget all prompts and pictures."""
        with self._answering, self._preparing:
            self._processed: dict[Any, dict[str, Any]] = {}
            self._pictures: list[_Picture] = []
            self._forget_prompt()
            self.reused_tokens = self.prefilled_tokens = self.encoded_images = 0

    def _forget_prompt(self) -> None:
        # Made without a configuration, so that layers with a sliding window keep every token and can be cut back.
        self._cache = DynamicCache()
        self._keys: list[int] = []  # of each token in the cache: its id, or its picture's key

    def answer(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Return the model's answer to a conversation.

        Args:
            messages: as `FastVLMProcessor.apply_chat_template` takes them, the last one the user's.
            **options: of `generate`, such as `max_new_tokens` or `streamer`.

        Raises:
            ValueError: see `prepare` and `generate`; several sequences are asked for.
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
        """Return what `generate` takes for a conversation, on the model's device.

        As `apply_chat_template` of the processor; pictures that Pillow opened are prepared only once.

        Raises:
            ValueError: what `FastVLMProcessor.apply_chat_template` raises.
        """
        processor = copy.copy(self.processor)
        with self._preparing:
            processor.image_processor = ImageMemory(processor.image_processor, self._processed, self.max_images)
            inputs: BatchFeature = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        return inputs.to(self.model.device)

    def process_images(self, images: list[Any], **options: Any) -> BatchFeature:
        """Return what the processor's image processor does, for a flat list; known pictures are prepared only once."""
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
        **options: Any,
    ) -> Any:
        """Return what `model.generate` returns for the same arguments.

        Args:
            input_ids: (1, length), the whole prompt; (rows, length), all rows the same, for several answers to it.
            attention_mask: of the same shape, all ones; or None.
            pixel_values, image_sizes, num_tiles: all of the prompt's pictures, as the processor made them.
            **options: of `model.generate`: sampling, beams, `streamer`, `max_new_tokens` and so on. With beams or
                several returned sequences the prompt is prefilled once, not once for each.

        Raises:
            ValueError: rows that differ, padding, placeholders that do not fit the pictures, or an option that does not
                go together with a cache of its own.
        """
        with self._answering:
            return self._generate(input_ids, attention_mask, (pixel_values, image_sizes, num_tiles), options)

    def _generate(
        self, input_ids: Tensor, attention_mask: Tensor | None, images_given: Any, options: dict[str, Any]
    ) -> Any:
        self._check(input_ids, attention_mask, options)
        pictures = self._remember(*images_given)
        prompt, spans = self._keys_of(input_ids[0].tolist(), pictures)
        start = self._cut_back(prompt, spans)
        rest = [picture for picture, (first, _) in zip(pictures, spans, strict=True) if first >= start]
        self.reused_tokens, self.prefilled_tokens = start, len(prompt) - start
        images: dict[str, Any] = {}
        if rest:
            features = BaseModelOutputWithPooling(pooler_output=[picture.features for picture in rest])
            images = {"mm_encoder_outputs": {"image": features}}
        copies = max(self._option(name, options) or 1 for name in ("num_beams", "num_return_sequences"))
        copies *= len(input_ids)
        if copies > 1 and spans and spans[-1][1] == len(prompt):
            raise ValueError("The prompt ends in a picture, with which beams cannot begin; add text after it.")
        mask = torch.ones_like(input_ids)
        options = _with_cache(options)
        try:
            if copies > 1:
                if len(prompt) - start > 1:
                    own = {"cache": self._cache, "use_cache": True, "logits_to_keep": 1}
                    self.model(input_ids=input_ids[:1, start:-1], attention_mask=mask[:1, :-1], **own, **images)
                images = {}
                self._cache.batch_repeat_interleave(copies)
            output = self.model.generate(
                input_ids=input_ids, attention_mask=mask, **{compat.CACHE: self._cache}, **images, **options
            )
        except BaseException:  # an interrupted answer, too, leaves its prompt behind
            self._keep_beginning(prompt)
            raise
        if copies > 1:
            self._keep_beginning(prompt)
        else:
            sequences = output if isinstance(output, Tensor) else output.sequences
            keys = prompt + sequences[0, len(prompt) :].tolist()
            self._keys = keys[: self._cache.get_seq_length()]  # the last token was never fed
        return output

    def _option(self, name: str, options: dict[str, Any]) -> Any:
        """Return one of generate()'s options: as given, else of the given configuration, else of the model's."""
        configs = (options.get("generation_config"), self.model.generation_config)
        values = [options.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> None:
        if input_ids.ndim != 2 or not input_ids.numel() or not (input_ids == input_ids[:1]).all():
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; expected (1, length), or rows that are the same: "
                "PromptCache takes one prompt at a time. For a batch call model.generate."
            )
        if attention_mask is not None and (attention_mask.shape != input_ids.shape or not attention_mask.all()):
            raise ValueError(
                "attention_mask is not of input_ids' shape and all ones; expected a prompt without padding."
            )
        for name, why in _NOT_TAKEN.items():
            if self._option(name, options) is not None:
                raise ValueError(f"{name} is set, but {why}")
        if options.get("use_cache") is False:
            raise ValueError("use_cache is False, but PromptCache lives from its cache. Call model.generate.")
        if compat.GENERATE_KEEPS_ENCODER_OUTPUTS and self._option("prefill_chunk_size", options) is not None:
            raise ValueError(
                "prefill_chunk_size is set, but Transformers before 5.20 would prefill what is in the cache again. "
                "Upgrade, or leave it out."
            )

    def _remember(
        self, pixel_values: Tensor | None, image_sizes: Tensor | None, num_tiles: Tensor | None
    ) -> list[_Picture]:
        """Return the prompt's pictures in order, with those encoded that were not known."""
        self.encoded_images = 0
        if pixel_values is None:
            return []
        counts, sizes = None if num_tiles is None else num_tiles.tolist(), None
        if counts is None:
            views = pixel_values.split(1)
        elif image_sizes is not None and len(image_sizes) == len(counts) and sum(counts) == len(pixel_values):
            views, sizes = pixel_values.split(counts), image_sizes.tolist()
        if (counts is None) != (image_sizes is None) or (counts is not None and sizes is None):
            self.model.get_image_features(pixel_values, image_sizes, num_tiles)  # raises, and says what does not fit
        found: list[_Picture] = []
        new: list[_Picture] = []
        for index, view in enumerate(views):
            size = None if sizes is None else sizes[index]
            picture = next((one for one in (*self._pictures, *new) if one.is_of(view, size)), None)
            if picture is None:
                picture = _Picture(view.clone(), size, next(self._next_key))
                new.append(picture)
            found.append(picture)
        if new:
            tiled = {}
            if sizes is not None:
                tiled["image_sizes"] = torch.tensor([one.size for one in new], device=pixel_values.device)
                tiled["num_tiles"] = torch.tensor([len(one.pixels) for one in new], device=pixel_values.device)
            pixels = torch.cat([one.pixels for one in new])
            features = self.model.get_image_features(pixels, **tiled, return_dict=True).pooler_output
            for picture, own in zip(new, features, strict=True):
                picture.features = own
        self.encoded_images = len(new)
        others = [one for one in self._pictures if one not in found]
        self._pictures = [*others[-self.max_images :], *dict.fromkeys(found)]
        return found

    def _keys_of(self, tokens: list[int], pictures: list[_Picture]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return what identifies each token, and of each picture the first position and the one after its last."""
        image_token_id = self.model.config.image_token_id
        places = [index for index, token in enumerate(tokens) if token == image_token_id]
        expected = sum(len(picture.features) for picture in pictures)
        if len(places) != expected:
            raise ValueError(
                f"input_ids has {len(places)} <image> placeholders, but the {len(pictures)} pictures have {expected} "
                "features. Let the processor make both, with one <image> in the text for each picture."
            )
        keys, spans, done = list(tokens), [], 0
        for picture in pictures:
            own = places[done : done + len(picture.features)]
            for place in own:
                keys[place] = picture.key
            spans.append((own[0], own[-1] + 1))
            done += len(own)
        return keys, spans

    def _cut_back(self, prompt: list[int], spans: list[tuple[int, int]]) -> int:
        """Cut the cache back to what it and `prompt` begin with, never inside a picture; return that length.

        The last token is always left to be fed, since its logits are wanted.
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
        """Keep one row of what all layers hold of `prompt`, after beams or an interruption at any point."""
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
    """Return options of generate() that use a cache; beside a whole configuration it takes no single ones."""
    config = options.get("generation_config")
    if config is None:
        return options | {"use_cache": True}
    config = copy.deepcopy(config)
    config.use_cache = True
    return options | {"generation_config": config}
