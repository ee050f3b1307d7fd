# SPDX-License-Identifier: Apache-2.0
"""What the image-text-to-text pipeline must do with a model (Transformers' own such file is not distributed)."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, pipeline

IMAGE = str(Path(__file__).resolve().parents[2] / "fixtures" / "images" / "square_rgb.png")


def chat(*images: str, text: str = "What is this?") -> list[dict[str, Any]]:
    """Return a conversation of one user turn."""
    parts = [{"type": "image", "url": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


class ImageTextToTextPipelineTests:
    task = "image-text-to-text"

    def get_test_pipeline(self, model: Any, tokenizer: Any, dtype: str = "float32", **_: Any) -> tuple[Any, list[Any]]:
        """Return the pipeline and its examples."""
        processor = AutoProcessor.from_pretrained(model.name_or_path)
        pipe = pipeline(self.task, model=model.to(getattr(torch, dtype)), processor=processor, max_new_tokens=4)
        return pipe, [chat(IMAGE), chat(IMAGE, IMAGE), chat()]

    def run_pipeline_test(self, pipe: Any, examples: list[Any]) -> None:
        """Ask by conversation and by prompt, for one answer and for several at once."""
        for example in examples:
            answer = pipe(example, generate_kwargs={"do_sample": False})
            assert answer[0]["input_text"] == example
            assert answer[0]["generated_text"][-1]["role"] == "assistant"
        answer = pipe(images=IMAGE, text="<image>\nWhat is this?", generate_kwargs={"do_sample": False})
        assert answer[0]["generated_text"].startswith("<image>\nWhat is this?")
        answers = pipe(examples[:2], generate_kwargs={"do_sample": False}, batch_size=2)
        alone = [pipe(example, generate_kwargs={"do_sample": False}) for example in examples[:2]]
        if pipe.model.dtype == torch.float32:
            assert [a[0]["generated_text"] for a in answers] == [a[0]["generated_text"] for a in alone]
