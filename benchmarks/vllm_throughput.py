# SPDX-License-Identifier: Apache-2.0
"""Tokens a second under vLLM as a ratio to those of Transformers' `generate`, for many requests at once on one CPU.

    .venvs/vllm/bin/python benchmarks/vllm_throughput.py [--model DIRECTORY] [--requests 32] [--rounds 5]
        [--dtype float32] [--threads N] [--out benchmarks/results/vllm_throughput.json]

Runs in vLLM's environment, so that both sides have its PyTorch and its Transformers. The requests of a round are
pictures of their own, one half to be described and the other half with a question, answered greedily: by vLLM, which
gets all at once; by `generate` one after another; and by `generate` in one padded batch, rows of like length together.
Time runs from Pillow images and messages to texts and covers image processing on all sides. The three take turns in
every round, with another first each time; no picture is seen twice, so nothing comes from a cache. Ratios are those of
the median rates; answers are compared, and the number of those that differ is part of the result.
"""

import argparse
import os
import time
from statistics import median
from typing import Any

import _results

HELD_OUT_SERIES = 2026
DESCRIBE = "Describe the picture."


def requests_of(round_number: int, count: int) -> list[Any]:
    """Return the conversations of a round, which no other round has."""
    from transformers_fastvlm.data.scenes import SceneDataset

    scenes = SceneDataset(count, seed=HELD_OUT_SERIES, start=round_number * count)
    conversations = []
    for index in range(count):
        row = scenes[index]
        question = DESCRIBE if index % 2 else row["messages"][0]["content"].removeprefix("<image>\n")
        content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": question}]
        conversations.append([{"role": "user", "content": content}])
    return conversations


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the rates of each side and their ratios."""
    import torch

    from transformers_fastvlm.engines import Answer, Sampling, load_engine

    torch.set_num_threads(options.threads)
    sampling = Sampling(max_new_tokens=options.max_new_tokens)
    engines = {
        "vllm": load_engine("vllm", options.model, dtype=options.dtype, batch_size=options.requests, cache_gib=1.0),
        "generate_one_by_one": load_engine("transformers", options.model, dtype=options.dtype, batch_size=1),
        "generate_batch": load_engine("transformers", options.model, dtype=options.dtype, batch_size=options.requests),
    }
    rates: dict[str, list[float]] = {name: [] for name in engines}
    tokens = different = 0
    try:
        for round_number in range(options.rounds + 1):
            conversations = requests_of(round_number, options.requests)
            answers: dict[str, list[Answer]] = {}
            names = list(engines)
            shift = round_number % len(names)
            for name in names[shift:] + names[:shift]:
                start = time.perf_counter()
                answers[name] = engines[name].generate(conversations, sampling)
                seconds = time.perf_counter() - start
                if round_number:  # the first is for warming up
                    rates[name].append(sum(answer.completion_tokens for answer in answers[name]) / seconds)
            if round_number:
                tokens += sum(answer.completion_tokens for answer in answers["vllm"])
                pairs = zip(answers["vllm"], answers["generate_one_by_one"], strict=True)
                different += sum(ours.text != theirs.text for ours, theirs in pairs)
    finally:
        for engine in engines.values():
            engine.close()
    medians = {name: median(found) for name, found in rates.items()}
    return {
        "tokens_a_second": {name: round(rate, 2) for name, rate in medians.items()},
        "tokens_a_second_of_each_round": {name: [round(rate, 2) for rate in found] for name, found in rates.items()},
        "ratio_to_one_by_one": round(medians["vllm"] / medians["generate_one_by_one"], 3),
        "ratio_to_batch": round(medians["vllm"] / medians["generate_batch"], 3),
        "tokens": tokens,
        "answers_that_differ": different,
    }


def main() -> None:
    parser = _results.parser(__doc__)
    parser.add_argument("--model", help="directory or hub repository; the embedded tiny model unless given")
    parser.add_argument("--requests", type=int, default=32, help="requests at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    # As many threads on all sides, on any cores; vLLM would bind its own to some.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

    from transformers_fastvlm.checkpoints import tiny_checkpoint

    name = options.model or "tiny"
    options.model = options.model or str(tiny_checkpoint())
    values = {
        "model": name,
        "requests": options.requests,
        "rounds": options.rounds,
        "max_new_tokens": options.max_new_tokens,
        "dtype": options.dtype,
        "threads": options.threads,
        "results": measure(options),
    }
    _results.write(options, values, packages=["vllm"])


if __name__ == "__main__":
    main()
