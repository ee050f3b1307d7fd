# SPDX-License-Identifier: Apache-2.0
"""OpenMP's threads, which PyTorch and llama.cpp compute with on Linux.

GNU's OpenMP keeps threads for each thread that has computed something. As soon as these are together more than the
CPUs, every thread sleeps at each barrier instead of spinning for a short time, and a decoding step has hundreds of
barriers (`GOMP_SPINCOUNT` in the manual of libgomp). So the threads that load a model, prepare inputs or wait give
theirs back, and the engine's thread computes at full speed.
"""

import contextlib
import ctypes
import os
import re
from pathlib import Path

__all__ = ["OpenMPThreads", "loaded_files"]

_SOFT = 1  # omp_pause_soft


def loaded_files(name: str) -> list[Path]:
    """Return the shared libraries of this process whose file names contain `name`, on Linux; elsewhere nothing."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return []
    found = re.findall(rf" (/.*/[^/\n]*{re.escape(name)}[^/\n]*)$", maps, re.MULTILINE)
    return [Path(path) for path in sorted(set(found))]


def _is_forked() -> bool:
    """Whether this process continues the program of its parent: both have the same addresses then."""
    try:
        return Path("/proc/self/auxv").read_bytes() == Path(f"/proc/{os.getppid()}/auxv").read_bytes()
    except OSError:  # no parent any more, or another user's
        return False


class OpenMPThreads:
    """The threads of all GNU OpenMP libraries that are loaded now."""

    # A forked process has inherited pools without their threads; ending those would wait for ever.
    _forked = _is_forked()

    def __init__(self) -> None:
        self._pauses = []
        for file in loaded_files("libgomp"):
            with contextlib.suppress(OSError, AttributeError):  # replaced since, or without OpenMP 5
                self._pauses.append(ctypes.CDLL(str(file)).omp_pause_resource_all)

    def release(self) -> None:
        """End those that wait for the calling thread. It gets new ones when it computes again."""
        if not self._forked:
            for pause in self._pauses:
                pause(_SOFT)


def _remember_fork() -> None:
    OpenMPThreads._forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_fork)
