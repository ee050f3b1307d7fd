# SPDX-License-Identifier: Apache-2.0
"""The model's outputs in PyTorch float32 for one image and question: the reference for exported files."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.scenes import SceneDataset
from ..image_processing_pil_fastvlm import FastVLMImageProcessorPil
from .export_source import Source

__all__ = ["Reference", "drawn_pixels", "merged_model", "prompt_ids", "reference", "relative_error"]

_NEW_TOKENS = 8


@dataclass(frozen=True)
class Reference:
    """One question and the model's answer.

    Attributes:
        pixel_values: (1, 3, size, size), from 0 to 1.
        prompt: the question's token ids with one `image_token_id` for the image.
        image_token_id: id of the placeholder in `prompt`.
        encoded: (1, tokens, channels), the encoder's output.
        features: (1, tokens, hidden size), the projector's output.
        logits: (length, vocabulary), of every token of the prompt, including those of the image.
        answer: the token ids of the greedy answer, at most 8.
    """

    pixel_values: Tensor
    prompt: tuple[int, ...]
    image_token_id: int
    encoded: Tensor
    features: Tensor
    logits: Tensor
    answer: tuple[int, ...]

    @property
    def input_ids(self) -> list[int]:
        """The prompt with as many placeholders as the image has tokens."""
        return self.prompt_with([self.image_token_id] * self.features.shape[1])

    def prompt_with(self, placeholders: list[int]) -> list[int]:
        """Return the prompt with `placeholders` in place of its one placeholder."""
        return [new for token in self.prompt for new in (placeholders if token == self.image_token_id else [token])]


def prompt_ids(source: Source, question: str) -> tuple[int, ...]:
    """Return the token ids of a question about one image, with one placeholder for the image."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = source.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(source.processor.tokenizer(text)["input_ids"])


def merged_model(source: Source, dtype: torch.dtype | str = torch.float32) -> Any:
    """Load the model with a merged encoder, since other runtimes do not support its train-time form."""
    model = source.model(dtype)
    model.model.vision_tower.reparameterize()
    return model


def drawn_pixels(side: int) -> Tensor:
    """Return a drawn scene as pixel values (1, 3, side, side), from 0 to 1."""
    prepare = FastVLMImageProcessorPil(size={"height": side, "width": side}, image_aspect_ratio="pad")
    return torch.as_tensor(prepare(_row()["images"], return_tensors="pt")["pixel_values"])


def _row() -> dict[str, Any]:
    return SceneDataset(1, seed=2026)[0]


@torch.no_grad()
def reference(source: Source, size: int | None = None) -> Reference:
    """Ask the model about a drawn scene, in float32 and greedily.

    Args:
        size: side of the image in pixels; by default the checkpoint's.
    """
    pixel_values = drawn_pixels(size or source.image_size)
    prompt = prompt_ids(source, _row()["messages"][0]["content"].removeprefix("<image>\n"))
    token_id = source.processor.image_token_id
    model = source.model(torch.float32)
    encoded = model.model.vision_tower(pixel_values).last_hidden_state.flatten(2).transpose(1, 2)
    features = model.model.multi_modal_projector(encoded)
    found = Reference(pixel_values, prompt, token_id, encoded, features, torch.empty(0), ())
    inputs = {"input_ids": torch.tensor([found.input_ids]), "pixel_values": pixel_values}
    logits = model(**inputs).logits[0]
    answer = model.generate(
        **inputs, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=_NEW_TOKENS
    )
    new = tuple(answer[0, len(found.input_ids) :].tolist())
    return Reference(pixel_values, prompt, token_id, encoded, features, logits, new)


def relative_error(found: Any, expected: Tensor) -> float:
    """Return ‖found - expected‖ / ‖expected‖ in float64; NaN or infinity if `found` has such values.

    Raises:
        ValueError: the shapes differ.
    """
    tensor = torch.as_tensor(found)
    if tensor.shape != expected.shape:
        raise ValueError(f"The exported files' output is {tuple(tensor.shape)}; expected {tuple(expected.shape)}.")
    return float((tensor.double() - expected.double()).norm() / expected.double().norm())
