# SPDX-License-Identifier: Apache-2.0
"""Overhead of lmms-eval compared with the model's time, in an evaluation of the tiny model on drawn scenes.

    python benchmarks/eval_overhead.py [--scenes 500] [--batch-size 16] [--dtype float32] [--out RESULTS.json]

Evaluates as `fastvlm eval tiny --data scenes.jsonl` does, without the measurement of the first token, and takes the
CPU seconds of each part: `model` is the steps of the engine's thread, `engine` adds the preparation of prompts,
`pictures` is the opening of the files, which every method needs. `harness` is everything else from reading the
questions to the written results: lmms-eval, the journal, scoring, writing. Loading and freeing the model and importing
lmms-eval are excluded.

CPU seconds cover all threads; other programs disturb them least. The parts run at the same time, so there are no wall
seconds of each. PyTorch has one thread. Needs the extra `eval`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _results import HELD_OUT_SERIES, parser, questions, settings, write

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.evaluation.eval_run import EvaluationOptions, evaluate
from transformers_fastvlm.evaluation.own_data import OwnData
from transformers_fastvlm.evaluation.tasks import import_harness


class Clock:
    """Adds up the CPU time between `start` and `stop`.

    Args:
        cpu: returns CPU seconds, of the process or of the thread.
    """

    def __init__(self, cpu: Callable[[], float] = time.thread_time) -> None:
        self.seconds = 0.0
        self._now = cpu

    def start(self) -> None:
        self._start = self._now()

    def stop(self) -> None:
        self.seconds += self._now() - self._start

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start()
            try:
                return function(*args, **kwargs)
            finally:
                self.stop()

        return timed


def write_scenes(folder: Path, count: int) -> Path:
    """Write scenes that no training used as a user's own data."""
    with open(folder / "scenes.jsonl", "w", encoding="utf-8") as file:
        for index, row in enumerate(questions(count)):
            row["image"].save(folder / f"{index}.png")
            line = {"image": f"{index}.png", "question": row["question"], "answer": row["answer"]}
            file.write(json.dumps(line) + "\n")
    return folder / "scenes.jsonl"


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Evaluate once and return the seconds of each part."""
    from transformers_fastvlm import engines

    clocks = {name: Clock() for name in ("prompts", "images", "steps", "pictures")}
    clocks |= {name: Clock(time.process_time) for name in ("import", "load", "whole")}
    clocks["import"].around(import_harness)()
    load = engines.load_engine

    def timed_load(*args: Any, **kwargs: Any) -> Any:
        engine: Any = clocks["load"].around(load)(*args, **kwargs)
        engine.close = clocks["load"].around(engine.close)
        engine.stream = clocks["prompts"].around(engine.stream)
        engine._encode, engine._step = clocks["images"].around(engine._encode), clocks["steps"].around(engine._step)
        return engine

    data = write_scenes(folder, options.scenes)
    engines.load_engine = timed_load
    OwnData.open_images = clocks["pictures"].around(OwnData.open_images)
    chosen = EvaluationOptions(
        data=data,
        max_new_tokens=16,
        batch_size=options.batch_size,
        engine_options={"dtype": options.dtype, "device": "cpu"},
        images=False,
        time_first_token=False,
    )
    clocks["whole"].start()
    run = evaluate(str(tiny_checkpoint()), folder / "out", chosen)
    clocks["whole"].stop()
    seconds = {name: clock.seconds for name, clock in clocks.items()}
    seconds["model"] = seconds.pop("images") + seconds.pop("steps")
    seconds["engine"] = seconds["model"] + seconds.pop("prompts")
    both = seconds.pop("whole") - seconds["load"] - seconds["engine"]
    seconds["harness"] = both - seconds["pictures"]
    overhead = {
        "harness_and_pictures_of_engine": both / seconds["engine"],
        "harness_and_pictures_of_model": both / seconds["model"],
        "harness_of_engine": seconds["harness"] / seconds["engine"],
    }
    return {
        "accuracy_percent": run.tasks["scenes"].score,
        "processor_seconds": {name: round(value, 3) for name, value in seconds.items()},
        "processor_overhead_percent": {name: round(100 * share, 2) for name, share in overhead.items()},
    }


def main() -> None:
    options = parser(__doc__, scenes=500, batch_size=16, dtype="float32").parse_args()
    torch.set_num_threads(1)  # the engine's CPU time is that of one thread
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options, Path(folder))
    about = {"model": "tiny", **settings(options), "series": HELD_OUT_SERIES, "threads": torch.get_num_threads()}
    write(options, about | measured, packages=["lmms-eval"])


if __name__ == "__main__":
    main()
