# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of the engine vllm, relative to the engine transformers, for many requests at once on one CPU.

    .venvs/vllm/bin/python benchmarks/vllm_throughput.py [--model DIRECTORY] [--requests 32] [--rows 32] [--rounds 5]
        [--longest 0] [--dtype float32] [--threads N] [--sides vllm,continuous,one_by_one]
        [--out benchmarks/results/vllm_throughput.json]

Runs in vLLM's environment, so that both sides have its PyTorch and its Transformers. Each request of a round has a
new image, so nothing comes from a cache; half ask for a description, half a question, with greedy decoding. They are
answered by vLLM, which gets all at once; by Transformers one after another (slow with a large model: `--sides` leaves
it out); and by Transformers in `--rows` rows, which requests join and leave. All sides take turns in every round. Time
runs from Pillow images and messages to texts. Ratios are of median rates; the number of answers that differ from vLLM's
is part of the result. With `--longest`, answers end at different lengths from 4 to so many tokens, as in
continuous_batching.py.
"""

import argparse
import os
import random
from functools import partial
from statistics import median
from typing import Any

import _results


def conversations_of(turn: int, count: int) -> list[Any]:
    """Return the conversations of a turn, which no other turn has."""
    rows = _results.questions(count, start=turn * count)
    for row in rows[1::2]:
        row["conversation"] = _results.ask(row["image"], "Describe the picture.")
    return [row["conversation"] for row in rows]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the rates of each side and their ratios."""
    import torch

    from transformers_fastvlm.bench.measuring import in_turns
    from transformers_fastvlm.engines import Sampling, load_engine

    torch.set_num_threads(options.threads)
    lengths = [options.max_new_tokens] * options.requests
    if options.longest:
        lengths = _results.answer_lengths(options.requests, options.longest, random.Random(3))
    samplings = [Sampling(max_new_tokens=length) for length in lengths]
    many = {"dtype": options.dtype, "batch_size": options.rows}
    load: dict[str, Any] = {
        "vllm": partial(load_engine, "vllm", options.model, **many, cache_gib=1.0),
        "continuous": partial(load_engine, "transformers", options.model, **many),
        "one_by_one": partial(load_engine, "transformers", options.model, **many | {"batch_size": 1}),
    }
    engines: dict[str, Any] = {name: load[name]() for name in options.sides.split(",")}
    asked = [conversations_of(turn, options.requests) for turn in range(1 + options.rounds)]
    given: dict[str, list[Any]] = {name: [] for name in engines}

    def answer(name: str) -> None:
        given[name].append(engines[name].generate(asked[len(given[name])], samplings))

    try:
        times = in_turns({name: partial(answer, name) for name in engines}, options.rounds)
    finally:
        for engine in engines.values():
            engine.close()
    tokens = {name: [sum(one.completion_tokens for one in turn) for turn in given[name][1:]] for name in engines}
    rates = {
        name: [count / seconds for count, seconds in zip(tokens[name], times[name].wall, strict=True)]
        for name in engines
    }
    medians = {name: median(found) for name, found in rates.items()}
    texts = {name: [one.text for turn in given[name][1:] for one in turn] for name in engines}
    others = [name for name in engines if name != "vllm" and "vllm" in engines]
    return {
        "tokens_a_second": {name: round(rate, 2) for name, rate in medians.items()},
        "tokens_a_second_of_each_round": {name: [round(rate, 2) for rate in found] for name, found in rates.items()},
        "vllm_to": {name: round(medians["vllm"] / medians[name], 3) for name in others},
        "tokens": sum(next(iter(tokens.values()))),
        "answers_that_differ": {
            name: sum(a != b for a, b in zip(texts["vllm"], texts[name], strict=True)) for name in others
        },
    }


def main() -> None:
    parser = _results.parser(
        __doc__,
        model="tiny",
        requests=32,
        rows=32,
        rounds=5,
        max_new_tokens=64,
        longest=0,
        dtype="float32",
        threads=None,
        sides="vllm,continuous,one_by_one",
    )
    options = parser.parse_args()
    # As many threads on all sides, on any cores; vLLM would bind its own to some.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    _results.write(options, {**_results.settings(options), "results": measure(options)}, packages=["vllm"])


if __name__ == "__main__":
    main()
