# SPDX-License-Identifier: Apache-2.0
"""Processes that measure, one for each subject, and their runs in turns."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["WorkerProcess", "run_in_turns"]

_KINDS = {
    "FileNotFoundError": OSError,
    "ImportError": ImportError,
    "ModuleNotFoundError": ImportError,
    "OSError": OSError,
    "ValueError": ValueError,
}
"""Errors of a process that are raised again with their class; all others become a RuntimeError."""


# As the command does: PyTorch comments on torchao's types when Transformers, and so this package, is imported.
_START = f"""
import logging
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
from {__package__}.worker import main
main()
"""


class WorkerProcess:
    """A process of `worker.py`, with one line of JSON for each request and answer.

    Args:
        name: what it measures, for messages.
        threads: CPU threads of its libraries.

    Attributes:
        name: as above.
        facts: the answer to the first request, by which the model was loaded.
    """

    def __init__(self, name: str, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        # The package may be imported from a source tree that is not on a new process's path.
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        self.name = name
        command = [sys.executable, "-c", _START]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> "WorkerProcess":
        return self

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer; an error in the process is raised again."""
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            line = self._answers.readline()
        if not line:
            code = self._process.wait()
            hint = "; killed, most likely out of memory" if code in (-9, 137) else ""
            raise RuntimeError(
                f"the process of {self.name} ended with status {code}{hint}. Try a smaller model, batch or size, or "
                "fewer models at once."
            )
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            kind = _KINDS.get(found["error"], RuntimeError)
            named = "" if kind is not RuntimeError else f"{found['error']}: "
            raise kind(f"{self.name}: {named}{found['message']}")
        return found

    def __exit__(self, *_: object) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()


def run_in_turns(
    workers: Sequence[WorkerProcess], warmup: int, repetitions: int, progress: Callable[[str], None]
) -> list[list[dict[str, Any]]]:
    """Let each process run once in every turn, and return the runs of each, warm-up included.

    Background load affects all of them alike, and none is always the first of a turn.

    Args:
        progress: called with a line before each turn.
    """
    runs: list[list[dict[str, Any]]] = [[] for _ in workers]
    for turn in range(warmup + repetitions):
        kind = "warm-up" if turn < warmup else "run"
        progress(f"{kind} {turn + 1} of {warmup + repetitions}: {', '.join(worker.name for worker in workers)}")
        for place in range(len(workers)):
            one = (place + turn) % len(workers)
            runs[one].append(workers[one].ask({"run": True}))
    return runs
