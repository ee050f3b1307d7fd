# SPDX-License-Identifier: Apache-2.0
"""Speed and memory: where the time to the first token goes, beside other implementations and models."""

from typing import Any

__all__ = ["Options", "make_photo", "photo_jpeg", "run", "run_encoders", "write_plots"]

_MODULE_OF = {
    "Options": "cases",
    "make_photo": "photo",
    "photo_jpeg": "photo",
    "run": "bench_run",
    "run_encoders": "encoders",
    "write_plots": "bench_plots",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
