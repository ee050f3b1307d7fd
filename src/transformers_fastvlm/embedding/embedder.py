# SPDX-License-Identifier: Apache-2.0
"""Vectors of images and texts from a FastVLM checkpoint."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize as unit_length
from torch.nn.utils.rnn import pad_sequence

from ..engines.base import Conversation
from ..engines.model_loading import find_device, load_model
from ..engines.prompts import Prompt, place_images, read_prompt
from ..images.reading import read_image
from .pooling import pool

__all__ = ["POOLINGS", "Embedder", "Input"]

POOLINGS = ("last", "mean", "encoder")
"""Ways to pool: the last token's state, the mean of all tokens' states, or the encoder's own vector."""

Input: TypeAlias = str | os.PathLike[str] | Image.Image | tuple[Any, str] | Conversation
"""An input to embed: a text (any str); an image (a Pillow image, or its path as a `Path`); a tuple of an image and a
text; or a conversation, a list of messages with Pillow images."""


class Embedder:
    """Makes one vector of each image, text, or image with text.

    The language model reads the input as a user's message in the chat template, and its last hidden states are pooled;
    the head that predicts tokens is not run. The vectors of Apple's checkpoints, which were not trained for retrieval,
    compare an image with a text only roughly: train them first, see docs/embeddings.md.

    Args:
        model: directory or hub repository, or "tiny"; or a loaded `FastVLMForConditionalGeneration` or `FastVLMModel`,
            in evaluation mode.
        processor: processor of a loaded model.
        pooling: "last" (state of the last token) or "mean" (of all tokens); or "encoder", the encoder's own vector of
            an image: CLIP's embedding where the checkpoint has its head, otherwise the mean of its features. The
            language model is not run then, and texts have no vector.
        normalize: give every vector length 1, so that dot products are cosines.
        system: system message that replaces the chat template's, as an instruction for the model; not for "encoder".
        device: "auto" (CUDA, else Apple's GPU, else the CPU) or a torch device; a loaded model stays where it is.
        dtype: "float32", "bfloat16", "float16" or "auto", the checkpoint's; a loaded model keeps its own.
        size: height and width, in pixels, that images are resized to, a multiple of 64; None for the checkpoint's.

    Attributes:
        model: the loaded model.
        processor: its `FastVLMProcessor`.
        pooling, normalize, system: as above.

    Raises:
        ValueError: an invalid option, an unavailable device, or files of different checkpoints.
        OSError: there is no such checkpoint, or its files are damaged.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        pooling: str = "last",
        normalize: bool = True,
        system: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        size: int | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(POOLINGS)}.")
        if pooling == "encoder" and system is not None:
            raise ValueError("system is given, but with pooling 'encoder' no text is read. Leave it out.")
        if processor is None:
            if not isinstance(model, str | os.PathLike):
                raise ValueError("processor is missing: a loaded model needs the processor of its checkpoint.")
            model, processor = load_model(os.fspath(model), find_device(device), dtype, size)
        self.model, self.processor = model, processor
        self.pooling, self.normalize, self.system = pooling, normalize, system

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        if self.pooling != "encoder":
            return int(self.model.config.text_config.hidden_size)
        vision = self.model.config.vision_config
        return int(vision.projection_dim or vision.num_features)

    def embed(
        self,
        inputs: Sequence[Input],
        *,
        batch_size: int = 16,
        as_tensor: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Any:
        """Return the vectors of inputs, in their order.

        Args:
            inputs: see `Input`.
            batch_size: number of inputs that the model reads together.
            as_tensor: return a tensor on the model's device.
            progress: called with the number of finished inputs and their total.

        Returns:
            float32, (inputs, dimension): an array, or a tensor.

        Raises:
            ValueError: see `stream`.
        """
        if isinstance(inputs, str | os.PathLike | Image.Image):
            raise ValueError(f"inputs is one {type(inputs).__name__}; expected a list of inputs: embed([…]).")
        rows = []
        for vectors in self._batches(inputs, batch_size):
            rows.append(vectors)
            progress(sum(map(len, rows)), len(inputs))
        found = torch.cat(rows) if rows else torch.empty(0, self.dimension, device=self.model.device)
        return found if as_tensor else found.cpu().numpy()

    def stream(self, inputs: Iterable[Input], *, batch_size: int = 16) -> Iterator[np.ndarray]:
        """Yield the vector of each input, float32 (dimension,); only one batch of inputs is in memory at a time.

        Args:
            inputs: see `Input`; may be endless.
            batch_size: number of inputs that the model reads together.

        Raises:
            ValueError: an input has no vector: an unusable image, a text that fills the model's context, or a text for
                pooling "encoder"; its number is named. Or the model is in training mode.
            OSError, MemoryError: a fault of the machine.
        """
        for vectors in self._batches(inputs, batch_size):
            yield from vectors.cpu().numpy()

    def prepare(self, inputs: Sequence[Input], first: int = 0) -> dict[str, Tensor]:
        """Return the model's inputs for one batch, on the CPU: token ids with their mask, and pixels.

        Args:
            inputs: see `Input`.
            first: number of the first input in error messages.

        Raises:
            ValueError: see `stream`.
        """
        prompts = []
        for index, one in enumerate(inputs, first):
            try:
                prompts.append(self._read(one))
            except ValueError as error:
                raise ValueError(f"Input {index}: {error}") from error
        batch: dict[str, Tensor] = {}
        images = [image for prompt in prompts for image in prompt.images]
        if images:
            batch |= self.processor.image_processor(images, return_tensors="pt")
        if self.pooling != "encoder":
            ids = [torch.tensor(prompt.expanded()) for prompt in prompts]
            side = self.processor.tokenizer.padding_side
            batch["input_ids"] = pad_sequence(ids, batch_first=True, padding_side=side)
            ones = [torch.ones_like(row) for row in ids]
            batch["attention_mask"] = pad_sequence(ones, batch_first=True, padding_side=side)
        return batch

    def vectors(self, **inputs: Any) -> Tensor:
        """Run the model on a prepared batch; gradients flow, for training.

        Args:
            **inputs: of `prepare`, or any others of `FastVLMModel.forward`, on the model's device.

        Returns:
            float32, (batch, dimension).
        """
        base = self.model.base_model
        if self.pooling == "encoder":
            pixels = inputs["pixel_values"]
            if "num_tiles" in inputs:  # the base view of each image
                tiles = inputs["num_tiles"]
                pixels = pixels[tiles.cumsum(0) - tiles]
            pooled = base.vision_tower(pixels.to(self.model.dtype)).pooler_output.float()
        else:
            mask = inputs["attention_mask"]
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            states = base(**inputs, position_ids=positions, use_cache=False).last_hidden_state
            pooled = pool(states, mask, self.pooling)
        return unit_length(pooled, dim=-1) if self.normalize else pooled

    def _batches(self, inputs: Iterable[Input], batch_size: int) -> Iterator[Tensor]:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
        if self.model.training:
            raise ValueError("the model is in training mode, in which vectors vary; call model.eval() first.")
        waiting, done = iter(inputs), 0
        while batch := list(itertools.islice(waiting, batch_size)):
            yield self._run(batch, done)
            done += len(batch)

    @torch.inference_mode()
    def _run(self, batch: Sequence[Input], done: int) -> Tensor:
        """Return the vectors of a batch, which comes after `done` other inputs."""
        device = self.model.device
        vectors = self.vectors(**{name: value.to(device) for name, value in self.prepare(batch, done).items()})
        if not vectors.isfinite().all():
            raise ValueError(
                f"a vector is not finite in {str(self.model.dtype).removeprefix('torch.')}. Use dtype float32 or "
                "bfloat16."
            )
        return vectors

    def _read(self, one: Input) -> Prompt:
        """Return an input as a checked prompt with decoded images."""
        conversation = self._conversation(one)
        prompt = read_prompt(self.processor, conversation, context=None)
        if self.pooling == "encoder":
            if len(prompt.images) != 1 or any(map(_has_text, conversation)):
                raise ValueError("expected an image alone: with pooling 'encoder' only images have a vector.")
            return prompt
        limit = self.processor.context_length
        if limit is not None and prompt.tokens > limit:
            raise ValueError(
                f"it has {prompt.tokens} tokens, but the model's context holds {limit}. Shorten the text, or use a "
                "smaller image."
            )
        return prompt

    def _conversation(self, one: Input) -> Conversation:
        if isinstance(one, list):
            return one
        parts = one if isinstance(one, tuple) else (None, one) if isinstance(one, str) else (one, "")
        image, text = parts if len(parts) == 2 else (None, None)
        if isinstance(image, os.PathLike):
            image = read_image(image)
        if not isinstance(text, str) or not isinstance(image, Image.Image | None):
            raise ValueError(
                f"it is a {type(one).__name__}; expected a text, a Pillow image, a Path, or a tuple of image and text."
            )
        content = [{"type": "text", "text": text}] if image is None else place_images(text, [image])
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, {"role": "user", "content": content}]


def _has_text(message: dict[str, Any]) -> bool:
    content = message["content"]
    return bool(content) if isinstance(content, str) else any(part.get("text") for part in content)
