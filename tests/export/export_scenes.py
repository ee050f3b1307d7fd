# SPDX-License-Identifier: Apache-2.0
"""Questions about drawn scenes with the tiny model's own greedy answers, for the tests of export targets."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from transformers_fastvlm import FastVLMForConditionalGeneration, FastVLMProcessor
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset

NEW_TOKENS = 24


@dataclass(frozen=True)
class SceneCase:
    """A question, as this package prepares it, and its answer.

    Attributes:
        image, question: before preparation.
        pixel_values: (1, 3, size, size).
        input_ids: with a placeholder for each of the picture's tokens.
        prompt: with one placeholder for the picture, at the index `place`.
        tokens: the answer's ids, without the one that ends it.
    """

    image: Image.Image
    question: str
    pixel_values: Tensor
    input_ids: list[int]
    prompt: list[int]
    place: int
    tokens: list[int]

    def prompt_with(self, token: int) -> list[int]:
        """Return the prompt with another id in the picture's place."""
        return [token if index == self.place else other for index, other in enumerate(self.prompt)]


@torch.no_grad()
def scene_cases(count: int, directory: Path | None = None) -> list[SceneCase]:
    """Return the first scenes of the seed that the tiny model's accuracy is told on, with its answers in float32."""
    directory = directory or tiny_checkpoint()
    model = FastVLMForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    processor = FastVLMProcessor.from_pretrained(directory)
    token, eos = processor.image_token_id, model.generation_config.eos_token_id
    scenes = SceneDataset(count, seed=2026)
    cases = []
    for index in range(count):
        row = scenes[index]
        text = processor.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=row["images"], return_tensors="pt")
        options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        answer = model.generate(**inputs, **options, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
        ids = inputs["input_ids"][0].tolist()
        first = ids.index(token)
        cases.append(
            SceneCase(
                row["images"][0],
                row["messages"][0]["content"].removeprefix("<image>\n"),
                inputs["pixel_values"],
                ids,
                ids[: first + 1] + [other for other in ids[first:] if other != token],
                first,
                until_end(answer.tolist(), eos),
            )
        )
    return cases


def until_end(tokens: list[int], eos: int | list[int]) -> list[int]:
    """Return the tokens before the first that ends an answer."""
    ends = eos if isinstance(eos, list) else [eos]
    return next((tokens[:place] for place, token in enumerate(tokens) if token in ends), tokens)
