# SPDX-License-Identifier: Apache-2.0
"""Random streams of a process: what a tool seeds for itself is the caller's no longer than the tool runs."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["kept_random_streams"]


@contextlib.contextmanager
def kept_random_streams() -> Iterator[None]:
    """Put back Python's, numpy's and PyTorch's random streams at the end of the block; also as a decorator.

    Of accelerators that of the current device of CUDA, where it is in use already.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
