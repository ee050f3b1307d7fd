# SPDX-License-Identifier: Apache-2.0
"""Data for training: reading and checking rows, batches with labels, and synthetic scenes.

Names are imported when they are first used, so that no part waits for what another needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batching import ModalityLengthSampler, grouped_sampler, row_lengths
    from .check import Report, check_dataset
    from .collator import FastVLMDataCollator
    from .loading import load
    from .sample_errors import ImageError, LengthError, SampleError
    from .samples import SampleDataset

_MODULE_OF = {
    "FastVLMDataCollator": "collator",
    "ImageError": "sample_errors",
    "LengthError": "sample_errors",
    "ModalityLengthSampler": "batching",
    "Report": "check",
    "SampleDataset": "samples",
    "SampleError": "sample_errors",
    "check_dataset": "check",
    "grouped_sampler": "batching",
    "load": "loading",
    "row_lengths": "batching",
}

__all__ = [
    "FastVLMDataCollator",
    "ImageError",
    "LengthError",
    "ModalityLengthSampler",
    "Report",
    "SampleDataset",
    "SampleError",
    "check_dataset",
    "grouped_sampler",
    "load",
    "row_lengths",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
