# SPDX-License-Identifier: Apache-2.0
"""Exact answers of the tiny model's exports in mlx-vlm and in Transformers' own fast_vlm, beside PyTorch in float32.

    python benchmarks/export_accuracy_mlx.py [--scenes 500] [--out benchmarks/results/export_accuracy_mlx.json]

Two series of questions, each about one scene, with greedy decoding and exact match:

- Every precision of the target `mlx`, from this package's pixel values, on images of any shape.
- The preprocessing of mlx-vlm (float32) and of `native` (float32, with Pillow and with torchvision), from the files of
  the export, on square and on oblong images.

It needs `pip install "transformers-fastvlm[mlx,bench,torchvision]"`. MLX is slow on a CPU: results are written after
every few scenes, with their number, so that a run can be stopped.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _results
import torch
from _results import HELD_OUT_SERIES, differences
from tiny_accuracy import MAX_NEW_TOKENS, overall, score
from transformers import AutoProcessor, FastVlmForConditionalGeneration

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.export import Source, export
from transformers_fastvlm.export.mlx import IMAGE_TOKEN_INDEX, encoder_of, greedy_answer, image_features

REFERENCE = "pytorch"
PRECISIONS = ("float32", "float16", "bfloat16", "q8", "q4")
STEP = 20

Answers = Callable[[list[dict[str, Any]]], dict[str, list[str]]]


def asked(processor: Any, rows: list[dict[str, Any]]) -> Any:
    """Return a processor's inputs for the rows' questions, as one batch."""
    texts = [
        processor.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False) for row in rows
    ]
    images = [row["images"] for row in rows]
    return processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")


@torch.inference_mode()
def in_pytorch(model: Any, processor: Any, rows: list[dict[str, Any]]) -> list[str]:
    """Return the answers of a model in PyTorch."""
    inputs = asked(processor, rows)
    tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, temperature=None)
    new: list[str] = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return new


class InMlx:
    """An export that mlx-vlm has loaded."""

    def __init__(self, directory: Path, source: Source) -> None:
        from mlx_vlm import load

        with encoder_of(source):
            self.model, self.processor = load(str(directory))
        self.tokenizer = self.processor.tokenizer
        eos = self.model.config.eos_token_id
        self.ends = eos if isinstance(eos, list) else [eos]

    def answer(self, ids: list[int], pixel_values: Any, features: Any) -> str:
        """Return the answer to a prompt with one placeholder, given the image's features."""
        tokens = greedy_answer(self.model, ids, pixel_values, MAX_NEW_TOKENS, self.ends, cached_image_features=features)
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def answer_with_own_processor(self, row: dict[str, Any]) -> str:
        """Return the answer to a row, prepared as mlx-vlm prepares it."""
        from mlx_vlm.prompt_utils import apply_chat_template

        question = row["messages"][0]["content"].removeprefix("<image>\n")
        prompt = apply_chat_template(self.processor, self.model.config, question, num_images=1)
        inputs = self.processor(images=row["images"], text=[prompt])
        pixels = as_mlx(inputs["pixel_values"])
        return self.answer(inputs["input_ids"][0].tolist(), pixels, image_features(self.model, pixels))


def as_mlx(pixel_values: Any) -> Any:
    """Return pixel values of any kind as an MLX array."""
    import mlx.core as mx
    import numpy as np

    return mx.array(np.asarray(pixel_values))


def precisions(folder: Path, source: Source, model: Any) -> Answers:
    """Return a function that asks every precision of the target mlx, from this package's pixel values."""
    loaded = {}
    for precision in PRECISIONS:
        export("mlx", source.directory, folder / precision, precision=precision, say=print)
        loaded[precision] = InMlx(folder / precision, source)
    processor = source.processor

    def answers(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
        given = {REFERENCE: in_pytorch(model, processor, rows)} | {precision: [] for precision in loaded}
        for row in rows:
            inputs = asked(processor, [row])
            pixels, ids = as_mlx(inputs["pixel_values"]), inputs["input_ids"][0].tolist()
            place = ids.index(processor.image_token_id)
            prompt = [*ids[:place], IMAGE_TOKEN_INDEX, *(i for i in ids[place:] if i != processor.image_token_id)]
            features: dict[str, Any] = {}
            for precision, runtime in loaded.items():
                # The quantized language models have the encoder of bfloat16.
                encoder = "bfloat16" if precision.startswith("q") else precision
                if encoder not in features:
                    features[encoder] = image_features(runtime.model, pixels)
                given[precision].append(runtime.answer(prompt, pixels, features[encoder]))
        return given

    return answers


def preprocessing(folder: Path, source: Source, model: Any) -> Answers:
    """Return a function that asks mlx-vlm and fast_vlm with their own preprocessing; after `precisions`."""
    runtime = InMlx(folder / "float32", source)
    export("native", source.directory, folder / "native", say=print)
    native: Any = FastVlmForConditionalGeneration.from_pretrained(folder / "native", dtype=torch.float32)
    native.eval()
    pillow, usual = (AutoProcessor.from_pretrained(folder / "native", **kw) for kw in ({"backend": "pil"}, {}))
    assert "transformers_fastvlm" not in type(pillow).__module__

    def answers(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
        return {
            REFERENCE: in_pytorch(model, source.processor, rows),
            "mlx-vlm": [runtime.answer_with_own_processor(row) for row in rows],
            "native, Pillow": in_pytorch(native, pillow, rows),
            "native, torchvision": in_pytorch(native, usual, rows),
        }

    return answers


def main() -> None:
    options = _results.parser(__doc__, scenes=500).parse_args()
    warnings.simplefilter("ignore")  # of mlx-vlm and what it imports
    source = Source(tiny_checkpoint())
    model = source.model(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        by_precision = precisions(Path(folder), source, model)
        by_preprocessing = preprocessing(Path(folder), source, model)
        parts: dict[str, tuple[str, Answers]] = {
            "precisions": ("any", by_precision),
            "own preprocessing, square pictures": ("square", by_preprocessing),
            "own preprocessing, oblong pictures": ("oblong", by_preprocessing),
        }
        rows: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
        given: dict[str, dict[str, list[str]]] = {part: {} for part in parts}
        for start in range(0, options.scenes, STEP):
            for part, (aspect, answers) in parts.items():
                scenes = SceneDataset(options.scenes, seed=HELD_OUT_SERIES, task="questions", aspect=aspect)
                new = [scenes[index] for index in range(start, min(options.scenes, start + STEP))]
                for name, texts in answers(new).items():
                    given[part].setdefault(name, []).extend(texts)
                rows[part] += [{key: value for key, value in row.items() if key != "images"} for row in new]
            report(rows, given, options)


def report(
    rows: dict[str, list[dict[str, Any]]], given: dict[str, dict[str, list[str]]], options: argparse.Namespace
) -> None:
    """Print the results so far, and write them."""
    results: dict[str, Any] = {}
    for part, answers in given.items():
        scores = {name: score(rows[part], texts) for name, texts in answers.items()}
        against = differences(answers, overall(scores), REFERENCE)
        results[part] = {"exact_answers_percent": scores, "against_pytorch": against}
    about = {"scenes": {part: len(asked_rows) for part, asked_rows in rows.items()}, "series": HELD_OUT_SERIES}
    _results.write(options, about | results, packages=["mlx", "mlx-vlm"])


if __name__ == "__main__":
    main()
