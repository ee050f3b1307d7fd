# SPDX-License-Identifier: Apache-2.0
"""Exact answers of a tiny model, trained by examples/train_tiny.py, on scenes that it was not trained on.

    python benchmarks/tiny_accuracy.py MODEL [--scenes 2000] [--out RESULTS.json]

Asks one question about each scene of a series that no training uses, greedily, and counts the answers that equal the
right one letter for letter: over all kinds of questions and shapes of pictures in float32, bfloat16 and float16; then,
in float32, square and oblong pictures apart, the oblong ones also cropped to their centre instead of padded.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

import transformers_fastvlm
from transformers_fastvlm.data.scenes import SceneDataset

# Training takes its scenes from series 1 to 3, its evaluation from series 10.
HELD_OUT_SERIES = 2026


@torch.inference_mode()
def answers(model: Any, processor: Any, scenes: SceneDataset, batch_size: int, **image_options: Any) -> list[str]:
    """Return the greedy answer to each row's question."""
    given: list[str] = []
    for start in range(0, len(scenes), batch_size):
        rows = [scenes[index] for index in range(start, min(len(scenes), start + batch_size))]
        texts = [
            processor.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
            for row in rows
        ]
        images = [row["images"] for row in rows]
        inputs = processor(
            text=texts, images=images, padding=True, padding_side="left", return_tensors="pt", **image_options
        )
        inputs = inputs.to(model.device, model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        given += processor.batch_decode(new, skip_special_tokens=True)
    return given


def score(model: Any, processor: Any, scenes: SceneDataset, batch_size: int, **image_options: Any) -> dict[str, Any]:
    """Return the percentage of exact answers, overall and by kind of question, and the first few wrong ones."""
    given = answers(model, processor, scenes, batch_size, **image_options)
    right: dict[str, list[bool]] = {}
    wrong = []
    for index, answer in enumerate(given):
        row = scenes[index]
        question, expected = (message["content"] for message in row["messages"])
        right.setdefault(row["kind"], []).append(answer == expected)
        if answer != expected:
            wrong.append(f"{row['id']}: {question.removeprefix('<image>').strip()} {expected} / {answer}")
    every = [hit for hits in right.values() for hit in hits]
    return {
        "overall": round(100 * sum(every) / len(every), 2),
        **{kind: round(100 * sum(hits) / len(hits), 2) for kind, hits in sorted(right.items())},
        "wrong": wrong[:20],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="directory of the model")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    directory = options.model
    processor = AutoProcessor.from_pretrained(directory)

    def load(dtype: str) -> Any:
        return AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype).to(options.device).eval()

    def run(title: str, model: Any, aspect: str = "any", **image_options: Any) -> dict[str, Any]:
        start = time.perf_counter()
        scenes = SceneDataset(options.scenes, seed=HELD_OUT_SERIES, task="questions", aspect=aspect)
        result = score(model, processor, scenes, options.batch_size, **image_options)
        shown = ", ".join(f"{kind} {value}" for kind, value in result.items() if kind != "wrong")
        print(f"{title:24} {shown} ({time.perf_counter() - start:.0f} s)", flush=True)
        return result

    results = {dtype: run(dtype, load(dtype)) for dtype in ("float32", "bfloat16", "float16")}
    model = load("float32")
    results["square"] = run("square, float32", model, "square")
    results["oblong_padded"] = run("oblong, padded", model, "oblong")
    results["oblong_cropped"] = run("oblong, cropped", model, "oblong", image_aspect_ratio="square")
    if options.out is not None:
        about = {
            "scenes": options.scenes,
            "series": HELD_OUT_SERIES,
            "exact_answers_percent": results,
            "machine": f"{platform.machine()}, {platform.system()}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "transformers_fastvlm": transformers_fastvlm.__version__,
        }
        options.out.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
