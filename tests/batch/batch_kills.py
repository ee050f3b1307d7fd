# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed: `python batch_kills.py MODEL FOLDER MOMENTS SEED`, in a process without other threads.

Loads the model once; each run is a process forked from here. FOLDER has the images and gets the outputs. First one
run is undisturbed. Then others are killed with SIGKILL at each step of the journal and of the output, and at MOMENTS
random moments, and gone on with. Prints, as JSON, how many were killed and how many outputs differ.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transformers_fastvlm.batch import BatchOptions, run_batch
from transformers_fastvlm.engines import Sampling, TransformersEngine


class Kept:
    """An engine that outlives a run, to be forked again."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.stream, self.check, self.batch_size = engine.stream, engine.check, engine.batch_size

    def close(self) -> None:
        pass


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killing(name: str, number: int, half: bool) -> None:
    """Kill this process at a call of a function of `os`: after half of what it writes, or before, or after it."""
    plain, calls = getattr(os, name), [0]

    def call(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] != number:
            return plain(*arguments)
        if half and name == "write":
            plain(arguments[0], arguments[1][: len(arguments[1]) // 2])
        elif half:
            plain(*arguments)
        die()

    setattr(os, name, call)


def forked(run: Callable[[], Any], after: float | None = None) -> int:
    """Run in a process of its own, killed after so many seconds; return how it ended, as `os.waitpid` does."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main() -> None:
    model, folder, moments, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    engine = TransformersEngine(model, dtype="float32", device="cpu")
    sampling = Sampling(max_new_tokens=3, temperature=1.0, seed=5)
    options = BatchOptions(prompt="What is it?", sampling=sampling, batch_size=3)

    def run(name: str) -> None:
        out = folder.parent / f"{name}.jsonl"
        run_batch([str(folder)], out, lambda: Kept(engine), options, about={"model": model})

    start = time.monotonic()
    assert forked(lambda: run("whole")) == 0
    duration = time.monotonic() - start
    whole = (folder.parent / "whole.jsonl").read_bytes()
    batches = -(-whole.count(b"\n") // 3)
    found = {"killed": 0, "steps": 0, "different": [], "rows": whole.count(b"\n")}

    def finish(name: str) -> None:
        out = folder.parent / f"{name}.jsonl"
        if not (out.exists() and not out.with_name(out.name + ".journal").exists()):
            assert forked(lambda: run(name)) == 0
        left = sorted(file.name for file in folder.parent.glob(f"{name}.*"))
        if out.read_bytes() != whole or left != [out.name]:
            found["different"].append((name, left))

    writes = [("write", number, True) for number in range(1, batches + 2)]
    syncs = [("fsync", number, half) for number in (1, 2, 3, batches + 3) for half in (False, True)]
    ends = [("replace", 1, False), ("replace", 1, True), ("unlink", 1, False), ("unlink", 2, False)]
    for name, number, half in [*writes, *syncs, *ends]:
        title = f"{name}{number}{half}"

        def killed(name: str = name, number: int = number, half: bool = half, title: str = title) -> None:
            killing(name, number, half)
            run(title)

        assert os.WTERMSIG(forked(killed)) == signal.SIGKILL, title
        found["steps"] += 1
        finish(title)
    draw = random.Random(seed)
    for number in range(moments):
        title = f"moment{number}"
        for _ in range(2):
            status = forked(lambda title=title: run(title), draw.uniform(0, duration))
            if not os.WIFSIGNALED(status):
                assert status == 0
                break
            found["killed"] += 1
        finish(title)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
