# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the scripts in this folder: options, questions about scenes, and writing of records.

`transformers_fastvlm.bench.measuring` has the rest: clocks, work in turns, medians and spreads.
"""

import argparse
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HELD_OUT_SERIES = 2026
"""Of the scenes to ask about; training takes its scenes from series 1 to 3, its evaluation from series 10."""

DESCRIBE = "Describe the picture."


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with the options that every script has, and one for each of `defaults`, of its type.

    Args:
        description: of the script, whose first line is shown.
        defaults: by the options' names; `threads=None` stands for one for each CPU, and a list for an
            option that takes several.
    """
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--note", default="", help="what else ran on the machine, for the record")
    made.add_argument("--out", type=Path, help="file to write, beside standard output")
    for name, default in defaults.items():
        if name == "threads" and default is None:
            default = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        several = isinstance(default, list)
        kind = type(default[0] if several else default)
        made.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, nargs="+" if several else None)
    return made


def settings(options: argparse.Namespace, *but: str) -> dict[str, Any]:
    """Return a script's options for its record."""
    return {name: value for name, value in vars(options).items() if name not in ("note", "out", *but)}


def questions(count: int, start: int = 0, aspect: str = "any", task: str = "questions") -> list[dict[str, Any]]:
    """Return scenes that no training has seen, each as {image, question, answer, conversation}."""
    from transformers_fastvlm.data.scenes import SceneDataset

    scenes = SceneDataset(count, seed=HELD_OUT_SERIES, start=start, aspect=aspect, task=task)  # type: ignore[arg-type]
    rows = []
    for index in range(count):
        row = scenes[index]
        question, answer = (message["content"] for message in row["messages"][:2])
        question, image = question.removeprefix("<image>\n"), row["images"][0]
        rows.append({"image": image, "question": question, "answer": answer, "conversation": ask(image, question)})
    return rows


def answer_lengths(count: int, longest: int, draw: random.Random) -> list[int]:
    """Return lengths of answers in tokens, from 4 to `longest`, as many short as long ones by their logarithm."""
    return [round(4 * (longest / 4) ** draw.random()) for _ in range(count)]


def ask(image: Any, question: str) -> list[dict[str, Any]]:
    """Return a conversation with one question about an image."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def percent(hits: Sequence[bool]) -> float:
    """Return how many of them are true."""
    return round(100 * sum(hits) / len(hits), 2)


def differences(given: dict[str, list[str]], correct: dict[str, float], reference: str) -> dict[str, dict[str, Any]]:
    """Return how far the answers of each other name are from those of `reference`.

    Args:
        given: answers by name.
        correct: percent of right ones by name.
    """
    return {
        name: {
            "points": round(correct[name] - correct[reference], 2),
            "other_answers": sum(a != b for a, b in zip(given[name], given[reference], strict=True)),
        }
        for name in correct
        if name != reference
    }


def operations(run: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds that `run` spends on the CPU in each of PyTorch's operations, from the longest on.

    Those of less than 1 % are summed under "others". Recording adds a little to each, so the sum is more than the time
    of an unrecorded run.
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    spent = {event.key: event.self_cpu_time_total / 1e3 for event in profile.key_averages()}
    least = 0.01 * sum(spent.values())
    shown = {name: round(spent[name], 1) for name in sorted(spent, key=lambda n: -spent[n]) if spent[name] >= least}
    return {**shown, "others": round(sum(value for value in spent.values() if value < least), 1)}


def write(
    options: argparse.Namespace, values: dict[str, Any], *, device: str = "cpu", packages: Sequence[str] = ()
) -> None:
    """Print what was measured, with the machine, the versions and the note, and write it to --out.

    Args:
        options: of the script, from `parser`.
        values: what was measured and how.
        device: which torch measured on.
        packages: further ones whose versions count, where they are installed.
    """
    from transformers_fastvlm.bench.measuring import surroundings, write_record

    print(write_record({**values, **surroundings(device, packages), "note": options.note}, options.out), end="")
