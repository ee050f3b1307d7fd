# SPDX-License-Identifier: Apache-2.0
"""Clocks that wait for the device, the split of one call of generate(), and what many of them amount to."""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor

__all__ = ["Clock", "Split", "peak_bytes", "spread"]

Moment = tuple[float, float]


class Clock:
    """Wall time and processor time of this process, in seconds, once the device has done all its work."""

    def __init__(self, device: torch.device) -> None:
        waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize, "xpu": torch.xpu.synchronize}
        self._wait: Callable[[], None] = waits.get(device.type, lambda: None)

    def now(self) -> Moment:
        """Return (wall, processor) seconds since some moment in the past."""
        self._wait()
        return time.perf_counter(), time.process_time()


class Split(LogitsProcessor):
    """Measures one call of generate(): give it as a logits processor, after `watch` on the parts that run before.

    The first call of a logits processor is the moment at which the prompt has been read and the first token is known,
    but for one argmax; the second is one step of decoding later. Waiting for the device between the parts costs a
    little on a GPU, so the time of the whole is measured apart, without a split.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.active = False
        self.parts: dict[str, list[float]] = {}
        self.steps: list[Moment] = []

    def watch(self, module: nn.Module, name: str) -> None:
        """Count the time inside `module`'s forward as the part `name`, also where it runs several times."""
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return inner(*args, **kwargs)
            start = self.clock.now()
            output = inner(*args, **kwargs)
            end = self.clock.now()
            part = self.parts.setdefault(name, [0.0, 0.0])
            part[0] += end[0] - start[0]
            part[1] += end[1] - start[1]
            return output

        module.forward = forward

    def begin(self) -> Moment:
        """Start to count, and return the moment."""
        self.parts, self.steps, self.active = {}, [], True
        return self.clock.now()

    def end(self) -> Moment:
        """Stop to count, and return the moment."""
        self.active = False
        return self.clock.now()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self.steps) < 2:
            self.steps.append(self.clock.now())
        return scores


def spread(values: list[float]) -> dict[str, Any]:
    """Return median, quartiles, extremes and number of some measurements, to five digits."""
    if len(values) > 1:
        q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    else:
        q1 = q3 = values[0]
    found = {"median": statistics.median(values), "q1": q1, "q3": q3, "min": min(values), "max": max(values)}
    return {name: float(f"{value:.5g}") for name, value in found.items()} | {"runs": len(values)}


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that this process has had: on CUDA of the device, else resident; None where unknown.

    Apple's GPU shares the memory of the machine, and what its driver holds now stands for its peak.
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
