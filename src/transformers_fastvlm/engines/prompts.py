# SPDX-License-Identifier: Apache-2.0
"""What every engine does before the model runs: conversations become prompts, or errors that say what is wrong."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..images.decoding import load_pixels
from ..images.read_options import ReadOptions
from ..images.reading import as_shown, pil_to_rgb
from ..tokens import IMAGE_TOKEN
from .base import MAX_SEED, MAX_TEMPERATURE, Conversation, Sampling

__all__ = ["Prompt", "check_sampling", "is_utf8", "read_prompts", "tokenizer_options"]

_SURROGATES = re.compile("[\ud800-\udfff]")

# Pillow converts these to RGB whatever they hold.
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class Prompt:
    """A conversation that was checked.

    Args:
        text: rendered by the chat template.
        ids: the text's tokens, one a picture.
        images: decoded, in their order.
        tokens: of text and pictures together.
    """

    text: str
    ids: list[int]
    images: list[Image.Image]
    tokens: int


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError for an option out of its range."""
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {sampling.max_new_tokens}; expected 1 or more.")
    if not 0 <= sampling.temperature <= MAX_TEMPERATURE:  # false for nan as well
        raise ValueError(
            f"temperature is {sampling.temperature}; expected a number from 0 (greedy) to {MAX_TEMPERATURE:g}."
        )
    if sampling.seed is not None and not 0 <= sampling.seed <= MAX_SEED:
        raise ValueError(f"seed is {sampling.seed}; expected a whole number from 0 to 2**64 - 1.")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}; expected above 0 and up to 1.")
    if "" in sampling.stop:
        raise ValueError("stop holds an empty text, at which every answer would end; expected texts of one or more.")


def read_prompts(
    processor: Any, conversations: Sequence[Conversation], context: int | None, max_images: int | None = None
) -> list[Prompt]:
    """Render conversations, decode their pictures and count their tokens.

    Args:
        processor: the checkpoint's `FastVLMProcessor`.
        conversations: each of messages in Transformers' form, with Pillow images.
        context: tokens of a conversation and its answer; None for any number.
        max_images: most pictures of a conversation; None for any number.

    Raises:
        ValueError: a conversation has an image without a place, a place without an image, too many images, an image
            that cannot be used, or fills the context; the message says which conversation, where there are several.
    """
    prompts = []
    for index, conversation in enumerate(conversations):
        try:
            prompts.append(_prompt(processor, conversation, context, max_images))
        except ValueError as error:
            where = f"Conversation {index}: " if len(conversations) > 1 else ""
            raise ValueError(f"{where}{error}") from error
    return prompts


def is_utf8(text: str) -> bool:
    """Return whether a text has no lone surrogates, which stand for bytes that are not UTF-8."""
    return not _SURROGATES.search(text)


def tokenizer_options(tokenizer: Any, text: str) -> dict[str, bool]:
    """Return the option that keeps a tokenizer from writing a second token of the beginning before a rendered text."""
    starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return {"add_special_tokens": False} if starts else {}


def _prompt(processor: Any, conversation: Conversation, context: int | None, max_images: int | None) -> Prompt:
    # Turned here, so that sizes, and with them the numbers of tokens, are those that the image processor sees.
    own = processor.image_processor
    options = ReadOptions(
        do_exif_transpose=getattr(own, "do_exif_transpose", True),
        alpha_background=getattr(own, "alpha_background", "white"),
    )
    images = [image for message in conversation for image in _pictures(message, options)]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    if not is_utf8(text):
        raise ValueError("the text has bytes that are not UTF-8. Decode it by the encoding that it is in.")
    places = text.count(IMAGE_TOKEN)
    if places != len(images):
        raise ValueError(
            f"the text has {places} places for images ({IMAGE_TOKEN}), but there are {len(images)} images. If "
            f"{IMAGE_TOKEN} is meant literally, write it otherwise, such as < image >."
        )
    if max_images is not None and len(images) > max_images:
        raise ValueError(
            f"the conversation has {len(images)} images, but this engine takes {max_images}. Load it with a larger "
            "max_images."
        )
    ids = processor.tokenizer(text, **tokenizer_options(processor.tokenizer, text))["input_ids"]
    found = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
    tokens = len(ids) - len(images) + sum(found.num_image_tokens or [])
    if context is not None and tokens >= context:
        raise ValueError(
            f"the conversation has {tokens} tokens and fills the model's context of {context}, with no room for an "
            "answer. Shorten it, or use fewer or smaller pictures."
        )
    return Prompt(text, ids, images, tokens)


def _pictures(message: dict[str, Any], options: ReadOptions) -> Iterator[Image.Image]:
    """Yield the images of a message, decoded and oriented, of which nothing can turn out unusable later.

    Raises:
        ValueError: one is damaged, too large, or of a mode whose values do not fit into 8 bits; or a part is neither
            text nor an opened picture. Names and addresses are for whoever calls to open, by rules of its own.
    """
    content = message.get("content")
    for part in content if isinstance(content, list) else []:
        if part.get("type") == "text":
            continue
        picture = part.get("image") if part.get("type") == "image" else None
        if not isinstance(picture, Image.Image):
            raise ValueError(
                f"a part of a message is {str(part)[:80]!r}; expected type text with text, or type image with a Pillow "
                "image."
            )
        picture = as_shown(load_pixels(picture), options)
        if picture.mode not in _PLAIN_MODES:
            pil_to_rgb(picture)
        yield picture
