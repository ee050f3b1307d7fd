# SPDX-License-Identifier: Apache-2.0
"""Answers a second of the batch engine over Transformers: pictures 16 at a time beside one at a time.

    python benchmarks/batch_throughput.py [--model tiny] [--pictures 64] [--batch-sizes 1 16] [--rounds 5]
        [--threads N] [--device cpu|cuda] [--dtype float32] [--out benchmarks/results/batch_throughput.json]

One loaded model answers the same questions about drawn scenes with each batch size in turns, greedily: the scenes' own
questions, whose answers are a word or a number, and "Describe the picture.", whose answers are a sentence. A figure is
the number of pictures over the median time of a turn; `processor` counts the time that the process computed, the one
to compare on a machine that others use too. Ratios are to the first batch size.
"""

import argparse
import os
import time
from statistics import median
from typing import Any

import _results
import torch

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.engines import Sampling, TransformersEngine

TASKS = ("questions", "captions")


def conversations(task: str, number: int) -> list[list[dict[str, Any]]]:
    """Return questions about scenes that no training has seen."""
    found = []
    scenes = SceneDataset(number, seed=2026, task=task)  # type: ignore[arg-type]
    for index in range(number):
        row = scenes[index]
        text = row["messages"][0]["content"].removeprefix("<image>\n")
        content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": text}]
        found.append([{"role": "user", "content": content}])
    return found


def measure(engine: TransformersEngine, task: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return answers a second with each batch size, in turns, and how the answers compare."""
    asked = conversations(task, options.pictures)
    sampling = Sampling(max_new_tokens=options.max_new_tokens)
    times: dict[int, list[tuple[float, float]]] = {size: [] for size in options.batch_sizes}
    texts: dict[int, list[str]] = {}
    tokens = 0
    for round_number in range(options.rounds + 1):
        for size in options.batch_sizes:
            engine.batch_size = size
            start, computed = time.perf_counter(), time.process_time()
            answers = engine.generate(asked, sampling)
            taken = time.perf_counter() - start, time.process_time() - computed
            if round_number:  # the first is for warming up
                times[size].append(taken)
            texts[size] = [answer.text for answer in answers]
            tokens = sum(answer.completion_tokens for answer in answers)
    speed = {
        size: {
            "answers_per_second": round(options.pictures / median(turn[0] for turn in turns), 3),
            "answers_per_processor_second": round(options.pictures / median(turn[1] for turn in turns), 3),
        }
        for size, turns in times.items()
    }
    first = options.batch_sizes[0]
    return {
        "batch_size": speed,
        "ratio": {
            f"{size} / {first}": {key: round(found[key] / speed[first][key], 3) for key in found}
            for size, found in speed.items()
            if size != first
        },
        "tokens_per_answer": round(tokens / options.pictures, 2),
        "answers_that_differ": {
            size: sum(one != other for one, other in zip(texts[first], texts[size], strict=True))
            for size in options.batch_sizes[1:]
        },
    }


def main() -> None:
    parser = _results.parser(__doc__)
    parser.add_argument("--model", default="tiny", help="directory of a model, or tiny, the one of the package")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each batch size")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    directory = str(tiny_checkpoint()) if options.model == "tiny" else options.model
    engine = TransformersEngine(directory, dtype=options.dtype, device=options.device)
    values = {
        "model": options.model,
        "pictures": options.pictures,
        "size": int(engine.processor.image_processor.size["height"]),
        "dtype": options.dtype,
        "rounds": options.rounds,
        "threads": options.threads,
        "results": {task: measure(engine, task, options) for task in TASKS},
    }
    _results.write(options, values, device=options.device)


if __name__ == "__main__":
    main()
