# SPDX-License-Identifier: Apache-2.0
"""What the tests of the ONNX export share: the tiny model's export, scenes, and PyTorch's answers about them."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from transformers_fastvlm import FastVLMProcessor
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.export import Export, export

PRECISIONS = ("float32", "float16", "q8", "q4", "q4f16")
MAX_NEW_TOKENS = 32


@functools.cache
def tiny_export() -> Export:
    """Export the tiny model in every precision, once a process."""
    folder = tempfile.mkdtemp(prefix="fastvlm-onnx-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return export("onnx", tiny_checkpoint(), Path(folder) / "tiny", precision=PRECISIONS)


@functools.cache
def tiny_model() -> tuple[Any, FastVLMProcessor]:
    """Return the tiny model in PyTorch float32 and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()
    return model, FastVLMProcessor.from_pretrained(tiny_checkpoint())


def scenes(count: int, aspect: str = "any") -> list[tuple[Image.Image, str, str]]:
    """Return (picture, question, expected answer) of `count` scenes."""
    rows = SceneDataset(count, seed=2026, aspect=aspect)
    found = []
    for row in (rows[index] for index in range(count)):
        question, answer = (message["content"] for message in row["messages"][:2])
        found.append((row["images"][0], question.removeprefix("<image>\n"), answer))
    return found


def conversation(picture: Image.Image, question: str) -> list[dict[str, Any]]:
    """Return one question about one picture."""
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


def prepared(picture: Image.Image, question: str) -> Any:
    """Return the processor's tensors of one question about one picture."""
    return tiny_model()[1].apply_chat_template(
        conversation(picture, question),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.no_grad()
def pytorch_answer(picture: Image.Image, question: str, max_new_tokens: int = MAX_NEW_TOKENS) -> tuple[list[int], str]:
    """Return tokens and text of PyTorch's greedy answer in float32."""
    model, processor = tiny_model()
    inputs = prepared(picture, question)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
