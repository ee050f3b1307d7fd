# SPDX-License-Identifier: Apache-2.0
"""Time to the first token of a second question about an image, as a ratio to that of the first.

    python benchmarks/second_question.py [--preset 0.5b] [--size 1024] [--dtype float32 bfloat16] [--rounds 3]
        [--threads N] [--device cpu|cuda] [--out benchmarks/results/second_question.json]

A model of the preset's shape with random weights answers through `PromptCache`: a first question about an image, a
second one in the same conversation, and an independent one about the same image. Time runs from the messages, with
the image decoded, to the first token. `processor_seconds` is CPU time; compare it on a shared machine. Every round
starts with an empty cache; figures are medians of the rounds.
"""

import argparse
import tempfile
from functools import partial
from statistics import median
from typing import Any

import _results
import torch
from transformers import AutoTokenizer

from transformers_fastvlm import FastVLMConfig, FastVLMImageProcessorPil, FastVLMProcessor
from transformers_fastvlm.bench.measuring import Clock, in_turns
from transformers_fastvlm.bench.photo import PHOTO_SIZE, make_photo
from transformers_fastvlm.bench.random_weights import random_model
from transformers_fastvlm.data.scenes.tokenizer import write_tokenizer
from transformers_fastvlm.inference import PromptCache
from transformers_fastvlm.kernels import speed_up_linear_layers


def measure(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Return medians over the rounds for one type of weights."""
    config = FastVLMConfig.from_preset(options.preset)
    config.vision_config.image_size = options.size
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = FastVLMProcessor(FastVLMImageProcessorPil(size=options.size), tokenizer)
    config.image_token_id = processor.image_token_id
    model = random_model(config, getattr(torch, dtype), torch.device(options.device))
    speed_up_linear_layers(model)  # as from_pretrained does
    cache = PromptCache(model, processor)
    photo = make_photo()
    first = _results.ask(photo, "What is in the picture?")
    answer = {"role": "assistant", "content": "A red square and two blue circles."}
    cases = {
        "first": first,
        "second": [*first, answer, {"role": "user", "content": "How many circles are there?"}],
        "of_its_own": _results.ask(photo, "Where is the square?"),
    }
    prefilled: dict[str, int] = {}

    def run(name: str) -> None:
        cache.answer(cases[name], max_new_tokens=1, do_sample=False)
        prefilled[name] = cache.prefilled_tokens

    times = in_turns(
        {name: partial(run, name) for name in cases},
        options.rounds,
        clock=Clock(options.device),
        before=lambda name, turn: cache.reset() if name == "first" else None,
        rotate=False,
    )
    medians = {
        name: {"seconds": round(median(own.wall), 4), "processor_seconds": round(median(own.cpu), 4)}
        for name, own in times.items()
    }
    base = medians["first"]["processor_seconds"]
    ratios = {name: round(medians[name]["processor_seconds"] / base, 4) for name in ("second", "of_its_own")}
    return {"medians": medians, "prefilled_tokens": prefilled, "ratio_to_first": ratios}


def main() -> None:
    parser = _results.parser(
        __doc__, preset="0.5b", size=1024, dtype=["float32", "bfloat16"], rounds=3, threads=None, device="cpu"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    values = {
        **_results.settings(options, "dtype", "device"),
        "picture": "{}x{} pixels, decoded".format(*PHOTO_SIZE),
        "results": {dtype: measure(options, dtype) for dtype in options.dtype},
    }
    _results.write(options, values, device=options.device)


if __name__ == "__main__":
    main()
