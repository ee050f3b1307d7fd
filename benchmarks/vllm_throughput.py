# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of the engine vllm, relative to the engine transformers, for many requests at once on one CPU.

    .venvs/vllm/bin/python benchmarks/vllm_throughput.py [--model DIRECTORY] [--requests 32] [--rows 32] [--rounds 5]
        [--longest 0] [--dtype float32] [--threads N] [--sides vllm,continuous,one_by_one]
        [--out benchmarks/results/vllm_throughput.json]

Runs in vLLM's environment, so that both sides have its PyTorch and its Transformers. Each request of a round has a
new image, so nothing comes from a cache; half ask for a description, half a question, with greedy decoding. They are
answered by vLLM, which gets all at once; by Transformers one after another (slow with a large model: `--sides` leaves
it out); and by Transformers in `--rows` rows, which requests join and leave. Each side is a process, and they take
turns in every round. Time runs from Pillow images and messages to texts. Ratios are of median rates; the number of
answers that differ from vLLM's is part of the result. With `--longest`, answers end at different lengths from 4 to so
many tokens, as in continuous_batching.py.
"""

import argparse
import contextlib
import multiprocessing
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


def serve_side(pipe: Any, name: str, options: argparse.Namespace) -> None:
    """Load one side's engine, then answer a turn for each number that comes, until None."""
    import torch

    from transformers_fastvlm.engines import Sampling, load_engine

    torch.set_num_threads(options.threads)
    engine: Any = {
        "vllm": partial(load_engine, "vllm", batch_size=options.rows, cache_gib=1.0),
        "continuous": partial(load_engine, "transformers", batch_size=options.rows),
        "one_by_one": partial(load_engine, "transformers", batch_size=1),
    }[name](options.model, dtype=options.dtype)
    samplings = [Sampling(max_new_tokens=length) for length in lengths_of(options)]
    asked = [conversations_of(turn, options.requests) for turn in range(1 + options.rounds)]
    pipe.send("loaded")
    while (turn := pipe.recv()) is not None:
        answers = engine.generate(asked[turn], samplings)
        pipe.send([(answer.text, answer.completion_tokens) for answer in answers])
    engine.close()


def lengths_of(options: argparse.Namespace) -> list[int]:
    """Return the maximum tokens of each request."""
    if options.longest:
        return _results.answer_lengths(options.requests, options.longest, random.Random(3))
    return [options.max_new_tokens] * options.requests


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the rates of each side and their ratios."""
    from transformers_fastvlm.bench.measuring import in_turns

    # A process for each side: threads of several engines in one process slow each other down.
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in options.sides.split(","):
        pipes[name], other = context.Pipe()
        processes.append(context.Process(target=serve_side, args=(other, name, options)))
        processes[-1].start()
        other.close()
        pipes[name].recv()
    given: dict[str, list[list[tuple[str, int]]]] = {name: [] for name in pipes}

    def answer(name: str) -> None:
        pipes[name].send(len(given[name]))
        given[name].append(pipes[name].recv())

    try:
        times = in_turns({name: partial(answer, name) for name in pipes}, options.rounds)
    finally:
        for pipe, process in zip(pipes.values(), processes, strict=True):
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
            process.join()
    tokens = {name: [sum(count for _, count in turn) for turn in turns[1:]] for name, turns in given.items()}
    rates = {
        name: [count / seconds for count, seconds in zip(tokens[name], times[name].wall, strict=True)] for name in pipes
    }
    medians = {name: median(found) for name, found in rates.items()}
    texts = {name: [text for turn in turns[1:] for text, _ in turn] for name, turns in given.items()}
    others = [name for name in pipes if name != "vllm" and "vllm" in pipes]
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
