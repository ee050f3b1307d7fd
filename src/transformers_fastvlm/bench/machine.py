# SPDX-License-Identifier: Apache-2.0
"""What figures depend on besides the program: the machine and the versions."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

__all__ = ["machine", "versions"]

_PACKAGES = ("torch", "torchvision", "transformers", "timm", "pillow", "numpy")
_VECTOR = ("avx", "amx", "fma", "asimd", "sve", "bf16", "i8mm")


def machine(device: torch.device) -> dict[str, Any]:
    """Describe processor, memory and, where `device` is one, the accelerator."""
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
        "memory_bytes": _memory(),
    }
    if hasattr(os, "sched_getaffinity"):
        described["cpus_allowed"] = len(os.sched_getaffinity(0))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return described


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those that the figures depend on."""
    from .. import __version__

    found = {"python": platform.python_version(), "transformers_fastvlm": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _memory() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
