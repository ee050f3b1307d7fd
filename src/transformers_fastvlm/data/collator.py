# SPDX-License-Identifier: Apache-2.0
"""The collator: from samples to a batch with labels, for `Trainer` and every other loop over a data loader."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..conversations import RENDERING, render_with_spans
from ..tokens import IMAGE_TOKEN
from .messages import check_messages, messages_and_sources
from .row_fields import SYSTEM_KEYS, images_of
from .sample_errors import LengthError, SampleError, listed, shortened

__all__ = ["CONVERSATIONS", "IGNORED", "FastVLMDataCollator"]

CONVERSATIONS = ("sft", "plain")
IGNORED = -100
"""The label of a token that is not supervised."""


class FastVLMDataCollator:
    """Makes a batch of samples: tokens, labels and pixels, padded on the right.

    A sample is `{"messages": […], "images": […], "id": …}`. A message has a role and a content: a string with one
    "<image>" for each image in a user's turns, or a list of parts. `images` holds Pillow images (or arrays) in their
    order. A sample without `images`, or with an empty list, is a text-only row and needs no dummy image. `image` is a
    single image; `system` or `system_prompt` is a system message. Other keys are ignored, but an image under another
    key raises.

    Supervised tokens (all others have the label -100):

    - "sft": the generation blocks of the processor's chat template. ChatML: each answer, `<|im_end|>` and the newline
      after it. Vicuna v1: each answer and `</s>`.
    - "plain", for stage 1: the row becomes one "<image>", the caption and a newline; caption and newline are supervised
      and the question is dropped.

    Calling returns a dictionary of

    - `input_ids`, `attention_mask`, `labels`: (rows, length), int64; each image has one placeholder per image token;
    - `pixel_values`: (total tiles, 3, height, width), float32; absent where no row has an image;
    - `image_sizes`, `num_tiles`: for AnyRes, as the image processor gives them.

    The collator and its processor can be shared between threads.

    Args:
        processor: a `FastVLMProcessor`; its template, image size and tokenizer are used unchanged.
        conversation: "sft" or "plain".
        max_length: maximum tokens of a row, placeholders included; a longer row is truncated. Images are never cut:
            a row whose images do not fit raises, and so does a row without supervised tokens after the cut. With None
            nothing is cut, and a row longer than the processor's `context_length` raises.
        pad_to_multiple_of: pad the length to a multiple of this, which can speed up tensor cores.

    Raises:
        ValueError: an option is invalid.
        SampleError: a row is invalid; the message names its id. No row is left out silently.

    Example:
        >>> collator = FastVLMDataCollator(processor, max_length=2048)  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data.load("train.json"), data_collator=collator)  # doctest: +SKIP
    """

    def __init__(
        self,
        processor: Any,
        *,
        conversation: str = "sft",
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if conversation not in CONVERSATIONS:
            raise ValueError(
                f"conversation is {conversation!r}; expected one of {', '.join(map(repr, CONVERSATIONS))}."
            )
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected a positive number of tokens, or None.")
        context = processor.context_length
        if max_length is not None and context is not None and max_length > context:
            raise ValueError(
                f"max_length is {max_length}, but the model's context holds {context} tokens. Set {context} or less."
            )
        if not getattr(processor.tokenizer, "is_fast", False):
            raise ValueError(
                f"the tokenizer is a {type(processor.tokenizer).__name__}, which has no character offsets; labels need "
                "a fast tokenizer (use_fast=True)."
            )
        if processor.tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no padding token; set tokenizer.pad_token, for instance to its eos_token."
            )
        template = processor.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if conversation == "sft" and "endgeneration" not in (template or ""):
            raise ValueError(
                "the processor's chat template has no {% generation %} blocks, which mark the supervised tokens. Use "
                "the template of FastVLMProcessor.from_pretrained, or add the blocks around the answers."
            )
        self.processor = processor
        self.conversation = conversation
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self._template = template

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return a batch of samples."""
        if not samples:
            raise ValueError("the batch has no samples; expected at least one.")
        chats, images = zip(*map(self._checked, samples, range(len(samples))), strict=True)
        pixels, tokens = self._pixels(samples, images)
        rows = []
        for number, row in enumerate(self.encode(chats, tokens)):
            try:
                rows.append(self._fitted(*row))
            except LengthError as error:
                raise LengthError(f"{_name(samples[number], number)}: {error}") from error
        return {
            "input_ids": self._padded([ids for ids, _ in rows], self.processor.tokenizer.pad_token_id),
            "attention_mask": self._padded([np.ones_like(ids) for ids, _ in rows], 0),
            "labels": self._padded([labels for _, labels in rows], IGNORED),
            **pixels,
        }

    def encode(
        self, chats: Sequence[Sequence[Mapping[str, str]]], tokens: Sequence[Sequence[int]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids and labels of conversations, each of shape (length,), neither truncated nor padded.

        Args:
            chats: conversations in the canonical form that `check_messages` accepts.
            tokens: for each conversation, the number of tokens of each image.
        """
        texts, spans = self._rendered(chats)
        tokenizer = self.processor.tokenizer
        bos = tokenizer.bos_token
        with RENDERING:  # other threads may change the tokenizer's padding
            encoded = tokenizer(
                texts,
                add_special_tokens=bos is None or not texts[0].startswith(bos),
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
        rows = []
        for ids, offsets, supervised, lengths in zip(
            encoded["input_ids"], encoded["offset_mapping"], spans, tokens, strict=True
        ):
            row, (starts, ends) = np.array(ids, np.int64), np.array(offsets, np.int64).T
            wanted = np.zeros(len(row), bool)
            for first, last in supervised:
                wanted |= (starts < last) & (ends > first)
            # An image has one placeholder in the text. Repeating it here avoids tokenizing the copies.
            repeats = np.ones(len(row), np.int64)
            repeats[row == self.processor.image_token_id] = lengths
            rows.append((np.repeat(row, repeats), np.repeat(np.where(wanted, row, IGNORED), repeats)))
        return rows

    def _rendered(self, chats: Sequence[Sequence[Mapping[str, str]]]) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """Return the text of each conversation, with one placeholder per image, and its supervised spans."""
        if self.conversation == "plain":
            answers = [chat[-1]["content"] for chat in chats]
            texts = [f"{IMAGE_TOKEN}{answer}\n" for answer in answers]
            return texts, [[(len(IMAGE_TOKEN), len(text))] for text in texts]
        assert self._template is not None
        return render_with_spans(list(map(list, chats)), self._template, **self.processor.tokenizer.special_tokens_map)

    def _checked(self, sample: Mapping[str, Any], number: int) -> tuple[list[dict[str, str]], list[Any]]:
        """Return the messages of a sample in the canonical form, and its images."""
        try:
            if "messages" not in sample:
                raise ValueError(
                    f"it has no 'messages'; its keys are {listed(sample)}. Trainer may have removed the column: set "
                    "remove_unused_columns=False in its arguments."
                )
            words = {key: sample.get(key) for key in ("messages", *SYSTEM_KEYS)}
            messages, inside = messages_and_sources(words)
            images = images_of(sample, inside)
            for image in images:
                if image is None or isinstance(image, _UNOPENED):
                    raise ValueError(
                        f"an image is {shortened(image)} ({type(image).__name__}); expected a Pillow image or an "
                        "array. transformers_fastvlm.data.load opens the images of a data set."
                    )
            check_messages(messages, len(images))
            self._check_kind(messages, len(images))
        except ValueError as error:
            raise SampleError(f"{_name(sample, number)}: {error}") from error
        return messages, images

    def _pixels(
        self, samples: Sequence[Mapping[str, Any]], images: Sequence[Sequence[Any]]
    ) -> tuple[dict[str, Tensor], list[list[int]]]:
        """Return the image processor's output for all images, and the number of tokens of each image, by row."""
        flat = [image for row in images for image in row]
        if not flat:
            return {}, [[] for _ in images]
        process = self.processor.image_processor
        try:
            features = process(flat, return_tensors="pt")
        except ValueError:
            for number, row in enumerate(images):
                try:
                    if row:
                        process(list(row), return_tensors="pt")
                except ValueError as error:
                    raise SampleError(f"{_name(samples[number], number)}: {error}") from error
            raise
        count = self.processor.replace_image_token
        lengths = iter([count(features, index).count(IMAGE_TOKEN) for index in range(len(flat))])
        return dict(features), [[next(lengths) for _ in row] for row in images]

    def measure(self, messages: Sequence[Mapping[str, str]], sizes: Sequence[Sequence[int]]) -> int:
        """Return the number of tokens of a row before truncation.

        Args:
            messages: a conversation in the canonical form.
            sizes: height and width of each of its images before preprocessing.

        Raises:
            ValueError: this collator refuses the row.
            LengthError: the row cannot be cut to `max_length`.
        """
        self._check_kind(messages, len(sizes))
        tokens = self.processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens if sizes else []
        ((ids, labels),) = self.encode([messages], [tokens])
        self._fitted(ids, labels)
        return len(ids)

    def _check_kind(self, messages: Sequence[Mapping[str, str]], num_images: int) -> None:
        roles = [turn["role"] for turn in messages]
        if self.conversation == "plain" and (num_images, roles) != (1, ["user", "assistant"]):
            raise ValueError(
                f"the row has {num_images} images and {len(roles)} messages, but conversation='plain' expects a "
                "caption: one image, one question and one answer. For other rows use conversation='sft'."
            )

    def _fitted(self, ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and labels, cut to `max_length`.

        Raises:
            LengthError: the row is too long and cannot be cut.
        """
        length, limit, context = len(ids), self.max_length, self.processor.context_length
        if limit is None:
            if context is not None and length > context:
                raise LengthError(
                    f"the row has {length} tokens, but the model's context holds {context}. Set max_length to truncate "
                    "such rows, or split the conversation."
                )
            return ids, labels
        places = np.flatnonzero(ids == self.processor.image_token_id)
        if len(places) and places[-1] >= limit:
            raise LengthError(
                f"its last image ends at token {places[-1] + 1} of {length}, but max_length is {limit}, and an image "
                "is never cut. Raise max_length, use a smaller image size, or shorten or remove the row."
            )
        if not (labels[:limit] != IGNORED).any():
            raise LengthError(
                f"max_length={limit} cuts off all supervised tokens of the row, which has {length} tokens. Raise "
                "max_length, or shorten or remove the row."
            )
        return ids[:limit], labels[:limit]

    def _padded(self, rows: Sequence[np.ndarray], value: int) -> Tensor:
        length = max(map(len, rows))
        if self.pad_to_multiple_of is not None:
            length += -length % self.pad_to_multiple_of
        padded = np.full((len(rows), length), value, np.int64)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row)] = row
        return torch.from_numpy(padded)


_UNOPENED = (str, bytes, os.PathLike, Mapping)


def _name(sample: Mapping[str, Any], number: int) -> str:
    if place := sample.get("place"):
        return str(place)
    known = sample.get("id")
    return f"sample {number} of the batch" + ("" if known is None else f" (id {shortened(known)})")
