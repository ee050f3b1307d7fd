# SPDX-License-Identifier: Apache-2.0
"""Measuring: clocks that synchronise with the device, alternating runs, statistics, and the record."""

import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import LogitsProcessor

from ..storage.atomic_files import write_lines

__all__ = [
    "Clock",
    "Split",
    "Times",
    "in_turns",
    "machine",
    "peak_bytes",
    "ratio",
    "spread",
    "surroundings",
    "versions",
    "write_record",
]

Moment = tuple[float, float]
Name = TypeVar("Name", bound=Hashable)

_PACKAGES = ("torch", "torchvision", "transformers", "timm", "pillow", "numpy")
_VECTOR = ("avx", "amx", "fma", "asimd", "sve", "bf16", "i8mm")


class Clock:
    """Wall time and CPU time of this process, in seconds, after the device has finished its work."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize, "xpu": torch.xpu.synchronize}
        self._wait: Callable[[], None] = waits.get(torch.device(device).type, lambda: None)

    def now(self) -> Moment:
        """Return wall and CPU seconds since an arbitrary moment."""
        self._wait()
        return time.perf_counter(), time.process_time()


@dataclass
class Times:
    """Wall and CPU seconds of several runs; on a shared machine compare CPU seconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, start: Moment, end: Moment) -> None:
        """Add the run between two moments."""
        self.wall.append(end[0] - start[0])
        self.cpu.append(end[1] - start[1])

    def spread(self) -> dict[str, dict[str, Any]]:
        """Return the spread of wall and CPU seconds."""
        return {"seconds": spread(self.wall), "processor_seconds": spread(self.cpu)}

    def rates(self, amount: float, name: str) -> dict[str, float]:
        """Return `amount` divided by the median seconds, as `NAME_per_second` and `NAME_per_processor_second`."""
        kinds = {"second": self.wall, "processor_second": self.cpu}
        return {f"{name}_per_{kind}": round(amount / statistics.median(values), 3) for kind, values in kinds.items()}


def in_turns(
    work: Mapping[Name, Callable[[], Any]],
    repetitions: int,
    *,
    warmup: int = 1,
    clock: Clock | None = None,
    before: Callable[[Name, int], Any] = lambda name, turn: None,
    rotate: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[Name, Times]:
    """Run each function once in every turn, and return the times by name, without the first `warmup` turns.

    Background load affects all functions alike, and none is always the first of a turn.

    Args:
        work: functions to measure, by name.
        before: called with name and turn right before each run; its time is not measured.
        rotate: False keeps the order of `work` in every turn.
        progress: called with a line before each turn.
    """
    clock = clock or Clock()
    times = {name: Times() for name in work}
    names = list(work)
    for turn in range(warmup + repetitions):
        progress(f"turn {turn + 1} of {warmup + repetitions}")
        first = turn % len(names) if rotate else 0
        for name in names[first:] + names[:first]:
            before(name, turn)
            start = clock.now()
            work[name]()
            end = clock.now()
            if turn >= warmup:
                times[name].add(start, end)
    return times


class Split(LogitsProcessor):
    """Measures the parts of one generate() call: call `watch` for each part, then pass it as a logits processor.

    The first call of a logits processor marks the end of the prefill, up to one argmax; the second is one decoding step
    later. Synchronising the device between the parts costs a little time on a GPU, so the total time is measured
    separately, without a split.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.active = False
        self.parts: dict[str, list[float]] = {}
        self.steps: list[Moment] = []

    def watch(self, module: nn.Module, name: str) -> None:
        """Count the time of all calls of `module`'s forward as the part `name`."""
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return inner(*args, **kwargs)
            start = self.clock.now()
            output = inner(*args, **kwargs)
            end = self.clock.now()
            part = self.parts.setdefault(name, [0.0, 0.0])
            for kind in range(2):
                part[kind] += end[kind] - start[kind]
            return output

        module.forward = forward

    def begin(self) -> Moment:
        """Start counting, and return the moment."""
        self.parts, self.steps, self.active = {}, [], True
        return self.clock.now()

    def end(self) -> Moment:
        """Stop counting, and return the moment."""
        self.active = False
        return self.clock.now()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self.steps) < 2:
            self.steps.append(self.clock.now())
        return scores


def spread(values: list[float]) -> dict[str, Any]:
    """Return median, quartiles, extremes and number of the measurements, to five digits."""
    if len(values) > 1:
        q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    else:
        q1 = q3 = values[0]
    found = {"median": statistics.median(values), "q1": q1, "q3": q3, "min": min(values), "max": max(values)}
    return {name: float(f"{value:.5g}") for name, value in found.items()} | {"runs": len(values)}


def ratio(times: float, reference: float) -> float:
    """Return the ratio of a value to `reference`, to four digits."""
    return float(f"{times / reference:.4g}")


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak memory of this process: device memory on CUDA, else resident memory; None if unknown.

    On Apple's GPU, which has no peak counter, it is the memory that the driver holds now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its figure would include the parent's memory at the moment of the fork.
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
        return None if line is None else int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the CPU, memory and, where `device` is one, the accelerator."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    described: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release().split('-')[0]}, {platform.machine()}",
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_instructions": [flag for flag in flags if flag.startswith(_VECTOR)],
        "cpu_count": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None,
    }
    if hasattr(os, "sched_getaffinity"):
        described["cpus_allowed"] = len(os.sched_getaffinity(0))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return described


def versions(further: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of Python, of this package and of the installed packages that affect the figures."""
    from .. import __version__

    found = {"python": platform.python_version(), "transformers_fastvlm": __version__}
    for package in (*_PACKAGES, *further):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def surroundings(device: torch.device | str = "cpu", packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return the description of the environment for a record: `machine` and `versions`."""
    return {"machine": machine(torch.device(device)), "versions": versions(packages)}


def write_record(record: Mapping[str, Any], out: str | os.PathLike[str] | None) -> str:
    """Return a record as JSON, and write it to `out` if given."""
    text = json.dumps(record, indent=2) + "\n"
    if out is not None:
        write_lines(out, text.splitlines())
    return text
