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
        prompt = "<image>\nWhat is this?"
        return pipe, [{"text": prompt, "images": IMAGE}, {"text": 2 * prompt, "images": [IMAGE, IMAGE]}]

    def run_pipeline_test(self, pipe: Any, examples: list[Any]) -> None:
        """Ask by conversation and by prompt, for one answer and for several at once."""
        greedy = {"do_sample": False}
        for example in examples:
            answer = pipe(**example, generate_kwargs=greedy)
            assert answer[0]["input_text"] == example["text"]
            assert answer[0]["generated_text"].startswith(example["text"])
            only_new = pipe(**example, generate_kwargs=greedy, return_full_text=False)
            assert answer[0]["generated_text"] == example["text"] + only_new[0]["generated_text"]
        chats = [chat(IMAGE), chat(IMAGE, IMAGE, text="What are these?"), chat()]
        alone = []
        for conversation in chats:
            answer = pipe(conversation, generate_kwargs=greedy)
            assert answer[0]["input_text"] == conversation
            assert answer[0]["generated_text"][-1]["role"] == "assistant"
            alone.append(answer[0]["generated_text"])
        # Pipelines do not put rows with and without images into one batch.
        answers = pipe(chats[:2], generate_kwargs=greedy, batch_size=2)
        together = [answer[0]["generated_text"] for answer in answers]
        assert len(together) == 2
        if pipe.model.dtype == torch.float32:
            assert together == alone[:2]
