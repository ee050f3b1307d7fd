# SPDX-License-Identifier: Apache-2.0
"""What the tests of the engine llamacpp share: exports, questions about drawn scenes, and PyTorch's answers to them."""

import atexit
import functools
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf_cases import tiny_export

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.engines import Answer, Sampling, TransformersEngine
from transformers_fastvlm.engines.llama_library import library
from transformers_fastvlm.engines.prompts import place_images
from transformers_fastvlm.export import export


@functools.cache
def exported(model: Path | None = None) -> Path:
    """Return the directory of an export, made once a process: of the tiny model, or of a checkpoint in float32."""
    if model is None:
        return tiny_export().directory
    folder = Path(tempfile.mkdtemp(prefix="fastvlm-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return export("gguf", model, folder / "gguf", precision=("float32",)).directory


class Cpu:
    """The library on a CPU with other features.

    Attributes:
        contexts: options of the contexts that were opened.
    """

    def __init__(self, features: bytes) -> None:
        self._features = features
        self.contexts: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(library(), name)

    def llama_print_system_info(self) -> bytes:
        return self._features

    def llama_init_from_model(self, model: Any, options: Any) -> Any:
        self.contexts.append(options)
        return library().llama_init_from_model(model, options)


def scenes(count: int, task: Any = "questions", seed: int = 77) -> list[list[dict[str, Any]]]:
    """Return conversations of one question about one scene that the tiny model has not seen."""
    rows = SceneDataset(count, seed=seed, task=task)
    messages = ((rows[index]["messages"][0]["content"], rows[index]["images"]) for index in range(count))
    return [[{"role": "user", "content": place_images(text, images)}] for text, images in messages]


def several_images(count: int) -> list[list[dict[str, Any]]]:
    """Return conversations about two scenes, the second one first in every other."""
    first, second = scenes(count), scenes(count, seed=78)
    both = []
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        parts = (
            [*other[0]["content"][:1], *one[0]["content"]]
            if index % 2
            else [*one[0]["content"][:1], *other[0]["content"]]
        )
        both.append([{"role": "user", "content": parts}])
    return both


TEXTS = [[{"role": "user", "content": text}] for text in ("What is the colour?", "Hi", "Describe the image. " * 20)]


def alone(engine: Any, conversations: Sequence[Any], sampling: Sampling) -> list[Answer]:
    """Return the answers of an engine that is asked one by one."""
    return [engine.stream(conversation, sampling).result() for conversation in conversations]


@functools.cache
def pytorch() -> TransformersEngine:
    """Return the tiny model in PyTorch float32."""
    return TransformersEngine(str(tiny_checkpoint()), dtype="float32", device="cpu", batch_size=8)


def shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    """Return the items in another order."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def together(engine: Any, *asked: tuple[Any, Sampling]) -> list[Any]:
    """Submit conversations so that all wait before the first is answered; return the requests."""
    prompts = [engine.prepare(conversation) for conversation, _ in asked]
    with engine._news:
        return [engine.submit(prompt, sampling)[0] for prompt, (_, sampling) in zip(prompts, asked, strict=True)]
