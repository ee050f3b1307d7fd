# SPDX-License-Identifier: Apache-2.0
"""Time to the first token of a second question about a picture, as a ratio to that of the first.

    python benchmarks/second_question.py [--preset 0.5b] [--size 1024] [--dtype float32 bfloat16] [--rounds 3]
        [--threads N] [--device cpu|cuda] [--out benchmarks/results/second_question.json]

A model of the preset's shape with random weights answers through `PromptCache`: a first question about a picture, a
second one in the same conversation, and one of its own about the same picture. Time runs from the messages, the
picture decoded, to the first token; `processor_seconds` is the time that the process computed, the one to compare on
a machine that others use too. Every round starts with an empty cache; medians of the rounds.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import _results
import torch
from transformers import AutoTokenizer

from transformers_fastvlm import FastVLMConfig, FastVLMImageProcessorPil, FastVLMProcessor
from transformers_fastvlm.bench.photo import make_photo
from transformers_fastvlm.bench.random_weights import random_model
from transformers_fastvlm.data.scenes.tokenizer import write_tokenizer
from transformers_fastvlm.inference import PromptCache
from transformers_fastvlm.kernels import speed_up_linear_layers

SIZE_OF_PICTURE = (4000, 3000)
ANSWER = "A red square and two blue circles."


def timed(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return the seconds that `run` took, by the clock and of the processor."""
    start, computed = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - computed}


def measure(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Return medians over the rounds for one type of weights."""
    config = FastVLMConfig.from_preset(options.preset)
    config.vision_config.image_size = options.size
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = FastVLMProcessor(FastVLMImageProcessorPil(size=options.size), tokenizer)
    config.image_token_id = processor.image_token_id
    device = torch.device(options.device)
    model = random_model(config, getattr(torch, dtype), device)
    speed_up_linear_layers(model)  # as from_pretrained does
    cache = PromptCache(model, processor)
    picture = make_photo(*SIZE_OF_PICTURE)

    def asked(text: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}

    first = [asked("What is in the picture?")]
    later = {"role": "user", "content": "How many circles are there?"}
    cases = {
        "first": first,
        "second": [*first, {"role": "assistant", "content": ANSWER}, later],
        "of_its_own": [asked("Where is the square?")],
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    prefilled = {}
    for round_number in range(options.rounds + 1):
        cache.reset()
        for name, messages in cases.items():
            found = timed(lambda given=messages: cache.answer(given, max_new_tokens=1, do_sample=False), device)
            prefilled[name] = cache.prefilled_tokens
            if round_number:  # the first is for warming up
                runs[name].append(found)
    medians = {
        name: {key: round(median(run[key] for run in found), 4) for key in found[0]} for name, found in runs.items()
    }
    base = medians["first"]["processor_seconds"]
    ratios = {name: round(medians[name]["processor_seconds"] / base, 4) for name in ("second", "of_its_own")}
    return {"medians": medians, "prefilled_tokens": prefilled, "ratio_to_first": ratios}


def main() -> None:
    parser = _results.parser(__doc__)
    parser.add_argument("--preset", default="0.5b")
    parser.add_argument("--size", type=int, default=1024, help="height and width that the encoder sees")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    values = {
        "preset": options.preset,
        "size": options.size,
        "rounds": options.rounds,
        "threads": options.threads,
        "picture": f"{SIZE_OF_PICTURE[0]}x{SIZE_OF_PICTURE[1]} pixels, decoded",
        "results": {dtype: measure(options, dtype) for dtype in options.dtype},
    }
    _results.write(options, values, device=options.device)


if __name__ == "__main__":
    main()
