# SPDX-License-Identifier: Apache-2.0
"""OpenMP's threads, which PyTorch and llama.cpp compute with on Linux.

GNU's OpenMP keeps threads for each thread that has computed something. As soon as all of them are more than the CPUs,
every thread sleeps at each barrier instead of spinning for a short time, and a decoding step has hundreds of barriers
(`GOMP_SPINCOUNT` in the manual of libgomp). So the threads that load a model, prepare inputs or wait give theirs back,
and the engine's thread computes at full speed.
"""

import contextlib
import ctypes
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


class OpenMPThreads:
    """The threads of all GNU OpenMP libraries that are loaded now."""

    def __init__(self) -> None:
        self._pauses = []
        for file in loaded_files("libgomp"):
            with contextlib.suppress(OSError, AttributeError):  # replaced since, or without OpenMP 5
                self._pauses.append(ctypes.CDLL(str(file)).omp_pause_resource_all)

    def release(self) -> None:
        """End those that wait for the calling thread. It gets new ones when it computes again."""
        for pause in self._pauses:
            pause(_SOFT)
