# SPDX-License-Identifier: Apache-2.0
"""`fastvlm env`: versions, devices and CPU features, for bug reports."""

import importlib.metadata
import json
import os
import re
from typing import Any

import typer

from . import options
from .cli_errors import reports_errors

__all__ = ["env"]

_DISTRIBUTION = "transformers-fastvlm"
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_", "MKL_", "OMP_", "PYTORCH_", "TORCH", "TRANSFORMERS_", "VLLM_", "FASTVLM_")
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD")


@reports_errors
def env(as_json: options.AsJson = False, debug: options.Debug = False) -> None:
    """Show versions, devices and CPU features, to paste into a bug report.

    The output has no names of users or machines, and only the environment variables that change how models run.

    Examples:

        fastvlm env

        fastvlm env --json
    """
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        values = [f"{key} {one}" for key, one in value.items()] if isinstance(value, dict) else value
        shown = values if isinstance(values, str) else ", ".join(values) or "none"
        typer.echo(f"{name.replace('_', ' '):{width}}{shown}")


def _facts() -> dict[str, Any]:
    import torch

    from ..bench.measuring import machine, versions
    from ..kernels.dispatch import has_fast_gemm

    described, packages = machine(torch.device("cpu")), versions(_optional_packages())
    dtypes = (torch.bfloat16, torch.float16)
    return {
        "version": packages.pop("transformers_fastvlm"),
        "python": packages.pop("python"),
        "system": described["system"],
        "cpu": f"{described['cpu']}, {described['cpu_count']} cores, {torch.get_num_threads()} threads",
        "cpu_instructions": described["cpu_instructions"],
        "memory": _gibibytes(described["memory_bytes"]),
        "fast_dtypes": [
            "float32",
            *(str(dtype).removeprefix("torch.") for dtype in dtypes if has_fast_gemm(dtype)),
        ],
        "accelerators": _accelerators(),
        "packages": packages,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES) and not _SECRET.search(name)
        },
    }


def _optional_packages() -> list[str]:
    """Return the packages that the extras name; none if the package itself is not installed."""
    try:
        required = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return sorted({re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required} - {_DISTRIBUTION})


def _accelerators() -> list[str]:
    import torch

    found = [
        f"cuda:{index} {torch.cuda.get_device_name(index)}, "
        f"{_gibibytes(torch.cuda.get_device_properties(index).total_memory)}, CUDA {torch.version.cuda}"
        for index in range(torch.cuda.device_count())
    ]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def _gibibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
