# SPDX-License-Identifier: Apache-2.0
"""What the model in PyTorch, in float32, answers to one picture and question: what exported files are held to."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.scenes import SceneDataset
from ..image_processing_pil_fastvlm import FastVLMImageProcessorPil
from .export_source import Source

__all__ = ["Reference", "merged_model", "picture", "prompt_ids", "reference", "relative_error"]

_NEW_TOKENS = 8


@dataclass(frozen=True)
class Reference:
    """One question and the model's answer.

    Attributes:
        pixel_values: (1, 3, size, size), from 0 to 1.
        prompt: the question's token ids with one `image_token_id` for the picture.
        image_token_id: what the picture's place is called in `prompt`.
        encoded: (1, tokens, channels), the encoder's output.
        features: (1, tokens, hidden size), the projector's output.
        logits: (length, vocabulary), after every token of the prompt, the picture's included.
        answer: the greedy token ids that follow, at most 8.
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
        """The prompt with as many placeholders as the picture has tokens."""
        return self.prompt_with([self.image_token_id] * self.features.shape[1])

    def prompt_with(self, placeholders: list[int]) -> list[int]:
        """Return the prompt with `placeholders` in the picture's place."""
        return [new for token in self.prompt for new in (placeholders if token == self.image_token_id else [token])]


def prompt_ids(source: Source, question: str) -> tuple[int, ...]:
    """Return the token ids of a question about one picture, with one placeholder for the picture."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = source.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(source.processor.tokenizer(text)["input_ids"])


def merged_model(source: Source, dtype: torch.dtype | str = torch.float32) -> Any:
    """Load the model with the branches of its encoder's train-time form merged, which other runtimes do not know."""
    model = source.model(dtype)
    model.model.vision_tower.reparameterize()
    return model


def picture(side: int) -> Tensor:
    """Return a drawn scene as pixel values (1, 3, side, side), from 0 to 1."""
    prepare = FastVLMImageProcessorPil(size={"height": side, "width": side}, image_aspect_ratio="pad")
    return torch.as_tensor(prepare(_row()["images"], return_tensors="pt")["pixel_values"])


def _row() -> dict[str, Any]:
    return SceneDataset(1, seed=2026)[0]


@torch.no_grad()
def reference(source: Source, size: int | None = None) -> Reference:
    """Ask the model about a drawn scene, in float32 and greedily.

    Args:
        size: side of the picture in pixels; by default the checkpoint's.
    """
    pixel_values = picture(size or source.image_size)
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
    """Return ‖found - expected‖ / ‖expected‖ in float64; nan or infinity where `found` has such values.

    Raises:
        ValueError: the shapes differ.
    """
    tensor = torch.as_tensor(found)
    if tensor.shape != expected.shape:
        raise ValueError(f"The exported files give the shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}.")
    return float((tensor.double() - expected.double()).norm() / expected.double().norm())
