# SPDX-License-Identifier: Apache-2.0
"""Answers per second of the batch engine over Transformers: 16 images at a time compared with one at a time.

    python benchmarks/batch_throughput.py [--model tiny] [--pictures 64] [--batch-sizes 1 16] [--rounds 5]
        [--threads N] [--device cpu|cuda] [--dtype float32] [--out benchmarks/results/batch_throughput.json]

One model answers the same questions about drawn scenes with each batch size in turns, by greedy decoding: short
questions, answered by a word or a number, and "Describe the picture.", answered by a sentence. A figure is the number
of images divided by the median time of a turn. `processor` is CPU time; compare it on a shared machine. Ratios are to
the first batch size.
"""

import argparse
from functools import partial
from typing import Any

import _results
import torch

from transformers_fastvlm.bench.measuring import in_turns
from transformers_fastvlm.engines import Sampling, load_engine


def measure(engine: Any, task: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return answers a second with each batch size, in turns, and how the answers compare."""
    asked = [row["conversation"] for row in _results.questions(options.pictures, task=task)]
    sampling = Sampling(max_new_tokens=options.max_new_tokens)
    sizes = options.batch_sizes
    given: dict[int, list[Any]] = {}

    def answer(size: int) -> None:
        engine.batch_size = size
        given[size] = engine.generate(asked, sampling)

    times = in_turns({size: partial(answer, size) for size in sizes}, options.rounds)
    speed = {size: times[size].rates(options.pictures, "answers") for size in sizes}
    texts = {size: [found.text for found in answers] for size, answers in given.items()}
    tokens = sum(found.completion_tokens for found in given[sizes[0]])
    return {
        "batch_size": speed,
        "ratio": {
            f"{size} / {sizes[0]}": {key: round(value / speed[sizes[0]][key], 3) for key, value in speed[size].items()}
            for size in sizes[1:]
        },
        "tokens_per_answer": round(tokens / options.pictures, 2),
        "answers_that_differ": {
            size: sum(one != other for one, other in zip(texts[sizes[0]], texts[size], strict=True))
            for size in sizes[1:]
        },
    }


def main() -> None:
    parser = _results.parser(
        __doc__,
        model="tiny",
        pictures=64,
        batch_sizes=[1, 16],
        max_new_tokens=64,
        rounds=5,
        threads=None,
        device="cpu",
        dtype="float32",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engine: Any = load_engine("transformers", options.model, dtype=options.dtype, device=options.device)
    values = {
        **_results.settings(options, "device", "batch_sizes"),
        "size": int(engine.processor.image_processor.size["height"]),
        "results": {task: measure(engine, task, options) for task in ("questions", "captions")},
    }
    _results.write(options, values, device=options.device)


if __name__ == "__main__":
    main()
