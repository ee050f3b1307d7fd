# SPDX-License-Identifier: Apache-2.0
"""Fast operations for CPUs, each beside the plain form that it replaces; tests hold the two together.

What is faster is decided at every call by device, type, shape and processor (`dispatch`). On accelerators, and under
`torch.compile` and `torch.export`, the plain forms run.
"""

from .convolution import conv2d, plain_conv2d
from .dispatch import eager_on_cpu, has_fast_products, is_slow
from .linear import Linear, linear, plain_linear, speed_up_linear_layers

__all__ = [
    "Linear",
    "conv2d",
    "eager_on_cpu",
    "has_fast_products",
    "is_slow",
    "linear",
    "plain_conv2d",
    "plain_linear",
    "speed_up_linear_layers",
]
