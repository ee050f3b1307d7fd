# SPDX-License-Identifier: Apache-2.0
"""Exact answers of a tiny model, trained by examples/train_tiny.py, on scenes that it was not trained on.

    python benchmarks/tiny_accuracy.py MODEL [--scenes 2000] [--variants float32 fused ...] [--out RESULTS.json]

Asks one question about each scene of a series that no training uses, by greedy decoding, and counts exact answers:
over all kinds of questions and shapes of images in float32, after fuse(), in bfloat16 and float16, and with weights
of 8 and 4 bits; then, in float32, square and oblong images apart, the oblong ones also cropped to their centre
instead of padded. Each variant but the first is also compared with float32: by the difference in points, and by the
number of changed answers, right or wrong.

All variants see the same batches: each is drawn and preprocessed once. The quantized language models have the
bfloat16 encoder, so its features are computed once for them all. They need torchao and are made as
docs/quantization.md says, on a CPU in 4 bits with groups of 32, which divide the widths of the tiny model.
"""

import time
from pathlib import Path
from typing import Any

import _results
import torch
from _results import HELD_OUT_SERIES, differences, percent
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.inference import fuse

REFERENCE = "float32"
QUANTIZED = ("int8", "int4")
VARIANTS = (REFERENCE, "fused", "bfloat16", "float16", *QUANTIZED)
MAX_NEW_TOKENS = 16


def load(directory: Path, variant: str, device: str) -> Any:
    """Load the model as a user of this variant does."""
    dtype = "bfloat16" if variant in QUANTIZED else REFERENCE if variant == "fused" else variant
    options: dict[str, Any] = {}
    if variant in QUANTIZED:
        options = {"quantization_config": quantization_config(variant, device), "device_map": device}
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, **options).eval()
    if variant not in QUANTIZED:
        model.to(device)
    return fuse(model) if variant == "fused" else model


def quantization_config(variant: str, device: str) -> Any:
    """Return how a user makes weights of 8 or 4 bits, as docs/quantization.md says."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    except ImportError as error:
        raise SystemExit(
            f'{variant} needs torchao: pip install "transformers-fastvlm[quantization]", or name other --variants.'
        ) from error
    from transformers import TorchAoConfig

    if variant == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    if torch.device(device).type == "cuda":
        return TorchAoConfig(Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"))
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


@torch.inference_mode()
def answers(
    models: dict[str, Any], processor: Any, scenes: SceneDataset, batch_size: int, **image_options: Any
) -> tuple[list[dict[str, Any]], dict[str, list[str]], dict[str, float]]:
    """Return the rows without images, each model's greedy answers to them, and the seconds that it took for them."""
    asked: list[dict[str, Any]] = []
    given: dict[str, list[str]] = {name: [] for name in models}
    seconds = dict.fromkeys(models, 0.0)
    for start in range(0, len(scenes), batch_size):
        rows = [scenes[index] for index in range(start, min(len(scenes), start + batch_size))]
        texts = [
            processor.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
            for row in rows
        ]
        images = [row.pop("images") for row in rows]
        asked += rows
        inputs = processor(
            text=texts, images=images, padding=True, padding_side="left", return_tensors="pt", **image_options
        )
        pixels, encoded = inputs.pop("pixel_values"), {}
        tiles = {name: inputs[name] for name in ("image_sizes", "num_tiles") if name in inputs}  # of AnyRes
        for name, model in models.items():
            begin = time.perf_counter()
            encoder = "bfloat16" if name in QUANTIZED else name
            if encoder not in encoded:
                own = pixels.to(model.device, model.dtype)
                encoded[encoder] = {"image": model.get_image_features(own, return_dict=True, **tiles)}
            tokens = model.generate(
                **inputs.to(model.device),
                mm_encoder_outputs=encoded[encoder],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
            new = tokens[:, inputs["input_ids"].shape[1] :]
            given[name] += processor.batch_decode(new, skip_special_tokens=True)
            seconds[name] += time.perf_counter() - begin
    return asked, given, seconds


def score(rows: list[dict[str, Any]], given: list[str]) -> dict[str, Any]:
    """Return the percentage of exact answers, overall and by kind of question, and the first few wrong ones."""
    right: dict[str, list[bool]] = {}
    wrong = []
    for row, answer in zip(rows, given, strict=True):
        question, expected = (message["content"] for message in row["messages"])
        right.setdefault(row["kind"], []).append(answer == expected)
        if answer != expected:
            wrong.append(f"{row['id']}: {question.removeprefix('<image>').strip()} {expected} / {answer}")
    return {
        "overall": percent([hit for hits in right.values() for hit in hits]),
        **{kind: percent(hits) for kind, hits in sorted(right.items())},
        "wrong": wrong[:20],
    }


def overall(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the percentage over all kinds of questions of each result."""
    return {name: result["overall"] for name, result in results.items()}


def main() -> None:
    parser = _results.parser(__doc__, scenes=2000, batch_size=50, device="cpu")
    parser.add_argument("model", type=Path, help="directory of the model")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    options = parser.parse_args()
    processor = AutoProcessor.from_pretrained(options.model)
    wanted = [name for name in VARIANTS if name in options.variants or name == REFERENCE]
    models = {name: load(options.model, name, options.device) for name in wanted}

    def run(titles: dict[str, str], aspect: str, **image_options: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Ask the models that `titles` names, and print and return their results under its titles."""
        scenes = SceneDataset(options.scenes, seed=HELD_OUT_SERIES, task="questions", aspect=aspect)
        chosen = {name: models[name] for name in titles}
        rows, given, seconds = answers(chosen, processor, scenes, options.batch_size, **image_options)
        results = {}
        for name, title in titles.items():
            results[title] = score(rows, given[name])
            shown = ", ".join(f"{kind} {value}" for kind, value in results[title].items() if kind != "wrong")
            print(f"{title:16} {shown} ({seconds[name]:.0f} s)", flush=True)
        return results, given

    results, given = run({name: name for name in wanted}, "any")
    found = differences(given, overall(results), REFERENCE)
    for name, difference in found.items():
        print(f"{name:16} {difference['points']:+.2f} points, {difference['other_answers']} other answers")
    for title, aspect, image_options in (
        ("square", "square", {}),
        ("oblong_padded", "oblong", {}),
        ("oblong_cropped", "oblong", {"image_aspect_ratio": "square"}),
    ):
        results |= run({REFERENCE: title}, aspect, **image_options)[0]
    values = {
        "scenes": options.scenes,
        "series": HELD_OUT_SERIES,
        "exact_answers_percent": results,
        "against_float32": found,
    }
    _results.write(options, values, device=options.device, packages=["torchao"])


if __name__ == "__main__":
    main()
