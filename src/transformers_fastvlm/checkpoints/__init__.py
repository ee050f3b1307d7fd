# SPDX-License-Identifier: Apache-2.0
"""Checkpoint layouts, and the converter between them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint_source import Layout, detect_layout
    from .conversion import Conversion, convert
    from .embedded import tiny_checkpoint
    from .projector import load_projector

_MODULE_OF = {
    "Conversion": "conversion",
    "Layout": "checkpoint_source",
    "convert": "conversion",
    "detect_layout": "checkpoint_source",
    "load_projector": "projector",
    "tiny_checkpoint": "embedded",
}

__all__ = ["Conversion", "Layout", "convert", "detect_layout", "load_projector", "tiny_checkpoint"]


def __getattr__(name: str) -> Any:
    # Registration imports the table of names from here, so the rest is imported on first use.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
