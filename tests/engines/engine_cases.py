# SPDX-License-Identifier: Apache-2.0
"""Conversations for the engines' tests, and what plain `generate` answers them."""

from typing import Any

from PIL import Image

from transformers_fastvlm import compat

QUESTION = "Describe the image."


def ask(text: str, *images: Image.Image, system: str | None = None) -> list[dict[str, Any]]:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def plain(engine: Any, conversation: list[dict[str, Any]], tokens: int) -> tuple[str, int, int]:
    """Return text, prompt tokens and new tokens of `model.generate` for one conversation, greedily."""
    inputs = engine.processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    with compat.plain_attention(engine.model):  # a running engine changes it before Transformers 5.19
        new = engine.model.generate(**inputs, do_sample=False, max_new_tokens=tokens)[0, length:]
    return engine.processor.decode(new, skip_special_tokens=True).strip(), length, len(new)
