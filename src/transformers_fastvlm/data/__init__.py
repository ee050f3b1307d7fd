# SPDX-License-Identifier: Apache-2.0
"""Data for training: reading and checking rows, batches with labels, and synthetic scenes."""

from typing import TYPE_CHECKING

from .._optional import lazy_names

if TYPE_CHECKING:
    from .batching import ModalityLengthSampler, grouped_sampler, row_lengths
    from .check import Report, check_dataset
    from .collator import FastVLMDataCollator
    from .loading import load
    from .sample_errors import ImageError, LengthError, SampleError
    from .samples import SampleDataset

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "batching": "ModalityLengthSampler grouped_sampler row_lengths",
        "check": "Report check_dataset",
        "collator": "FastVLMDataCollator",
        "loading": "load",
        "sample_errors": "ImageError LengthError SampleError",
        "samples": "SampleDataset",
    },
)
