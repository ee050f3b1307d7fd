# SPDX-License-Identifier: Apache-2.0
"""Turn conversations into prompts, for every engine, with clear errors for invalid ones."""

import copy
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from .. import compat
from ..images.decoding import load_pixels
from ..images.read_options import ReadOptions
from ..images.reading import as_shown, pil_to_rgb
from ..tokens import IMAGE_TOKEN
from .base import Conversation, PromptTooLong

__all__ = ["LITERAL", "LiteralTexts", "Prompt", "is_utf8", "place_images", "read_prompt"]

LITERAL = f"< {IMAGE_TOKEN.strip('<>')} >"
"""Replacement for `<image>` in plain text: for the model, the token always means an image."""

_SURROGATES = re.compile("[\ud800-\udfff]")

# Pillow can convert any image of these modes to RGB.
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(kw_only=True)
class Prompt:
    """A checked and tokenized conversation.

    Args:
        ids: token ids, with one placeholder per image.
        image_token_id: id of the placeholder.
        image_tokens: number of tokens of each image.
        images: decoded images, in order; empty after `inputs` is made.
        inputs: the model's inputs for this prompt alone, if the engine makes them in advance.
        seconds: time to prepare the prompt.
        continues: whether the answer continues the last message; leading white space is then part of the answer.
    """

    ids: list[int]
    image_token_id: int
    image_tokens: list[int]
    images: list[Image.Image]
    inputs: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    continues: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens, texts and images together."""
        return len(self.ids) - len(self.image_tokens) + sum(self.image_tokens)

    def expanded(self, images: Sequence[Sequence[int]] | None = None) -> list[int]:
        """Return the tokens with those of each image in place of its placeholder.

        Args:
            images: tokens of each image; None for the placeholder, repeated.
        """
        given = iter(images or [[self.image_token_id] * count for count in self.image_tokens])
        repeated = (next(given) if token == self.image_token_id else (token,) for token in self.ids)
        return [token for tokens in repeated for token in tokens]


def read_prompt(
    processor: Any,
    conversation: Conversation,
    *,
    context: int | None,
    max_images: int | None = None,
    literal: "LiteralTexts | None" = None,
    continue_last: bool = False,
) -> Prompt:
    """Render a conversation, decode its images and count its tokens.

    Args:
        processor: the checkpoint's `FastVLMProcessor`.
        conversation: messages in Transformers' form, with Pillow images.
        context: maximum tokens of a conversation and its answer; None for no limit.
        max_images: maximum number of images in a conversation; None for no limit.
        literal: encodes control tokens as plain text; None keeps them as control tokens.
        continue_last: end the prompt with the text of the last message, which is the assistant's.

    Raises:
        PromptTooLong: the conversation fills the context.
        ValueError: an image without a placeholder, a placeholder without an image, too many images, or an unusable
            image or text; or the message to continue is not the assistant's.
    """
    if continue_last and conversation[-1].get("role") != "assistant":
        raise ValueError(
            f"the last message has the role {conversation[-1].get('role')!r}, so it cannot be continued; expected "
            "'assistant'."
        )
    # Images are rotated here, so that their sizes and token counts match those in the image processor.
    own = processor.image_processor
    options = ReadOptions(
        do_exif_transpose=getattr(own, "do_exif_transpose", True),
        alpha_background=getattr(own, "alpha_background", "white"),
    )
    images = [image for message in conversation for image in _images(message, options)]
    ids = _ids(processor, conversation, literal, continue_last)
    places = ids.count(processor.image_token_id)
    if places != len(images):
        raise ValueError(
            f"the text has {places} placeholders ({IMAGE_TOKEN}), but there are {len(images)} images. If "
            f"{IMAGE_TOKEN} is meant as text, write {LITERAL} instead."
        )
    if max_images is not None and len(images) > max_images:
        raise ValueError(
            f"the conversation has {len(images)} images, but this engine takes at most {max_images}. Load it with a "
            "larger max_images."
        )
    counts = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
    prompt = Prompt(
        ids=ids,
        image_token_id=processor.image_token_id,
        image_tokens=list(counts.num_image_tokens or []),
        images=images,
        continues=continue_last,
    )
    if context is not None and prompt.tokens >= context:
        raise PromptTooLong(prompt.tokens, context)
    return prompt


def place_images(text: str, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Return the parts of a user's message: images at the <image> placeholders, or first if there are none.

    Raises:
        ValueError: the text has placeholders, but not one for each image.
    """
    shown = [{"type": "image", "image": image} for image in images]
    if IMAGE_TOKEN not in text:
        return [*shown, {"type": "text", "text": text}]
    first, *rest = text.split(IMAGE_TOKEN)
    if len(rest) != len(images):
        raise ValueError(
            f"the question has {len(rest)} {IMAGE_TOKEN}, but there {'is' if len(images) == 1 else 'are'} "
            f"{len(images)} image{'' if len(images) == 1 else 's'}. Write it once for each image, or leave it out to "
            f"put the images first; if it is meant as text, write {LITERAL}."
        )
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for image, words in zip(shown, rest, strict=True):
        parts += [image, {"type": "text", "text": words}]
    return [part for part in parts if part.get("text") != ""]


class LiteralTexts:
    """Encodes conversations with control tokens in texts, `<image>` included, as plain text.

    Transformers changes the tokenizer's settings for this, so the class uses a copy, in one thread at a time. Before
    Transformers 5.23 this is not possible, and control tokens keep their meaning.

    Args:
        processor: the checkpoint's `FastVLMProcessor`.
    """

    def __init__(self, processor: Any) -> None:
        self._template, self._tokenizer = processor.chat_template, copy.deepcopy(processor.tokenizer)
        self._lock = threading.Lock()

    def encode(self, conversation: Conversation, continue_last: bool = False) -> list[int]:
        """Return the token ids of a conversation, with one placeholder per image; see `read_prompt`."""
        options = {"sanitize_control_tokens": True} if compat.SANITIZES_CONTROL_TOKENS else {}
        with self._lock:
            encoded = self._tokenizer.apply_chat_template(
                conversation,
                chat_template=self._template,
                add_generation_prompt=not continue_last,
                continue_final_message=continue_last,
                tokenize=True,
                return_dict=True,
                **options,
            )
        ids: list[int] = encoded["input_ids"]
        return ids


def is_utf8(text: str) -> bool:
    """Return whether a text has no lone surrogates, which represent bytes that are not UTF-8."""
    return not _SURROGATES.search(text)


def _ids(processor: Any, conversation: Conversation, literal: "LiteralTexts | None", continue_last: bool) -> list[int]:
    # In a text to continue, Transformers finds no literal <image>; what this rendering is for needs no such text.
    continues = continue_last and literal is None
    text = processor.apply_chat_template(
        conversation, add_generation_prompt=not continues, continue_final_message=continues, tokenize=False
    )
    if not is_utf8(text):
        raise ValueError("the text has bytes that are not UTF-8. Decode the bytes with their encoding first.")
    tokenizer = processor.tokenizer
    # The template may already write the token that the tokenizer would add at the start.
    bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    if literal is None:
        ids: list[int] = tokenizer(text, add_special_tokens=not bos)["input_ids"]
        return ids
    return [*([] if bos else tokenizer("")["input_ids"]), *literal.encode(conversation, continue_last)]


def _images(message: dict[str, Any], options: ReadOptions) -> Iterator[Image.Image]:
    """Yield the images of a message, decoded, rotated and fully checked.

    Raises:
        ValueError: an image is damaged, too large, or has a mode whose values do not fit into 8 bits; or a part is
            neither text nor an opened image. The caller must open paths and URLs, by its own rules.
    """
    content = message.get("content")
    for part in content if isinstance(content, list) else []:
        if part.get("type") == "text":
            continue
        image = part.get("image") if part.get("type") == "image" else None
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"a part of a message is {str(part)[:80]!r}; expected type text with text, or type image with a Pillow "
                "image."
            )
        image = as_shown(load_pixels(image), options)
        if image.mode not in _PLAIN_MODES:
            pil_to_rgb(image)
        yield image
