# SPDX-License-Identifier: Apache-2.0
"""Faster answers from a loaded model: a fused encoder, and a cache for the common beginning of several prompts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fusing import fuse
    from .prompt_cache import PromptCache

_MODULE_OF = {"PromptCache": "prompt_cache", "fuse": "fusing"}

__all__ = ["PromptCache", "fuse"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
