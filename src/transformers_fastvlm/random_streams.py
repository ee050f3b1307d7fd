# SPDX-License-Identifier: Apache-2.0
"""Random streams of a process: a tool that sets a seed restores the caller's streams afterwards."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["kept_random_streams"]


@contextlib.contextmanager
def kept_random_streams() -> Iterator[None]:
    """Restore Python's, numpy's and PyTorch's random streams at the end of the block; also works as a decorator.

    Of accelerators, only the current CUDA device's stream is restored, if CUDA is initialized.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
