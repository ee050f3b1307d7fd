# SPDX-License-Identifier: Apache-2.0
"""A benchmark of engines: each in a separate process, measured alternately through the interface of all tools."""

import contextlib
import itertools
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from .bench_run import FORMAT, PHOTO_SIDE, Progress
from .engine_cases import EngineCase, EngineOptions
from .measuring import spread, surroundings
from .photo import photo_jpeg
from .worker_process import WorkerProcess, run_in_turns

__all__ = ["engine_request", "engine_result", "run_engines"]


def run_engines(options: EngineOptions, progress: Progress = lambda done, total, doing: None) -> dict[str, Any]:
    """Measure engines and return the record, which `json` can write.

    Every engine runs in a separate process, all are loaded at the same time and run alternately. Each run has a new
    image, so no engine can reuse a cache.

    Args:
        progress: called before each engine is loaded and before each round, as in `run`.

    Raises:
        ValueError: an engine cannot use its model, precision or device.
        ImportError: an optional package is missing.
        OSError: a directory is missing or damaged.
        RuntimeError: a process died, for instance out of memory.
    """
    done, total = itertools.count(), len(options.cases) + options.warmup + options.repetitions
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        image_file = options.image
        if image_file is None:
            image_file = str(Path(folder) / "photo.jpg")
            Path(image_file).write_bytes(photo_jpeg(PHOTO_SIDE, PHOTO_SIDE))
        workers = []
        for case in options.cases:
            progress(next(done), total, f"loading {case.name}")
            worker = stack.enter_context(WorkerProcess(case.name, options.threads))
            worker.facts = worker.ask(engine_request(case, options.threads, options.new_tokens, image_file))
            workers.append(worker)
        runs = run_in_turns(
            workers, options.warmup, options.repetitions, lambda line: progress(next(done), total, line)
        )
    results = [
        engine_result(case, worker.facts, own[options.warmup :], options.new_tokens)
        for case, worker, own in zip(options.cases, workers, runs, strict=True)
    ]
    fastest = min(range(len(results)), key=lambda one: results[one]["answer_seconds"])
    return {
        "format": FORMAT,
        "kind": "engines",
        **surroundings(packages=("onnxruntime", "llama-cpp-python", "vllm")),
        "options": options.as_dict(),
        "results": results,
        "fastest": {"result": fastest, "command": options.cases[fastest].command()},
    }


def engine_request(case: EngineCase, threads: int, new_tokens: int, image_file: str) -> dict[str, Any]:
    """Return the first request to the process of an engine."""
    return {"engine": asdict(case), "threads": threads, "new_tokens": new_tokens, "image": image_file}


def engine_result(
    case: EngineCase, facts: dict[str, Any], runs: list[dict[str, Any]], new_tokens: int
) -> dict[str, Any]:
    """Return the result of an engine from the runs that count.

    `answer_seconds` is the time of an answer of `new_tokens` tokens by the medians, the image's file included.
    """
    names = [name for name in ("preprocess", "first_token", "decode") if any(name in run["seconds"] for run in runs)]
    times = {name: [run["seconds"][name] for run in runs if name in run["seconds"]] for name in names}
    decode = median(times["decode"]) if "decode" in times else 0.0
    return {
        "engine": case.engine,
        "model": case.model,
        **{name: value for name, value in facts.items() if name != "load_seconds"},
        "load_seconds": {name: round(value, 3) for name, value in facts["load_seconds"].items()},
        "tokens": [run["tokens"] for run in runs],
        "seconds": {name: spread(values) for name, values in times.items()},
        "tokens_per_second": spread([1 / value for value in times["decode"]]) if decode else None,
        "answer_seconds": float(f"{median(times['first_token']) + (new_tokens - 1) * decode:.5g}"),
        "peak_bytes": runs[-1]["peak_bytes"],
        "imports_bytes": runs[-1]["imports_bytes"],
    }
