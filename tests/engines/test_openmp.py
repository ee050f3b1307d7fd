# SPDX-License-Identifier: Apache-2.0
"""Threads of OpenMP: those that wait beside the engine's thread would slow down all of its barriers."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_cases import ask

from transformers_fastvlm.engines import TransformersEngine
from transformers_fastvlm.engines.openmp import OpenMPThreads, loaded_files

pytestmark = pytest.mark.skipif(not loaded_files("libgomp"), reason="PyTorch computes without GNU's OpenMP here")


@pytest.fixture
def four_threads() -> Callable[[], int]:
    """Returns a function that computes with four threads and returns how many the process has then."""

    def compute() -> int:
        threads = torch.get_num_threads()
        torch.set_num_threads(4)
        torch.rand(1 << 20).exp_()
        torch.set_num_threads(threads)
        return running()

    return compute


def running() -> int:
    return len(os.listdir("/proc/self/task"))


def test_threads_end_when_they_are_released(four_threads: Callable[[], int]) -> None:
    openmp = OpenMPThreads()
    openmp.release()
    before = settled()
    assert four_threads() == before + 3
    openmp.release()
    wait_for(before)


def test_an_answer_releases_those_of_the_caller_and_then_its_own(
    checkpoint: Callable[[str], Path], four_threads: Callable[[], int]
) -> None:
    engine = TransformersEngine(str(checkpoint("qwen2_tied")), dtype="float32", device="cpu")
    OpenMPThreads().release()
    engine.generate([ask("Hi")])  # the first one starts threads that stay
    before = settled()
    assert four_threads() == before + 3
    engine.generate([ask("Hi")])
    wait_for(before)
    engine.close()


def test_preparing_releases_those_of_the_caller(
    checkpoint: Callable[[str], Path], four_threads: Callable[[], int]
) -> None:
    engine = TransformersEngine(str(checkpoint("qwen2_tied")), dtype="float32", device="cpu")
    engine.prepare(ask("Hi"))  # the first one starts threads that stay
    before = settled()
    assert four_threads() == before + 3
    engine.prepare(ask("Hi"))
    wait_for(before)
    engine.close()


FORK = """
import os, signal, sys, torch
if sys.argv[1] == "before":
    import transformers_fastvlm.engines.openmp
torch.set_num_threads(4)
torch.rand(1 << 20).exp_()
child = os.fork()
if not child:
    signal.alarm(60)
    from transformers_fastvlm.engines.openmp import OpenMPThreads
    OpenMPThreads().release()
    os._exit(0)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
"""


@pytest.mark.parametrize("imported", ["before", "after"])
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have(imported: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", FORK, imported]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def settled() -> int:
    """Return the number of threads after it has not changed for a while."""
    threads, since = running(), time.monotonic()
    while time.monotonic() < since + 0.5:
        if running() != threads:
            threads, since = running(), time.monotonic()
        time.sleep(0.01)
    return threads


def wait_for(threads: int) -> None:
    """Wait until the process has at most so many threads."""
    end = time.monotonic() + 20
    while running() > threads and time.monotonic() < end:
        time.sleep(0.01)
    assert running() <= threads
