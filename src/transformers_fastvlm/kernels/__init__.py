# SPDX-License-Identifier: Apache-2.0
"""Fast operations for CPUs, each beside the plain form that it replaces; tests compare the two.

`dispatch` chooses the form at every call, by device, dtype, shape and CPU. On accelerators, and under `torch.compile`
and `torch.export`, the plain forms run.
"""

from .convolution import conv2d, plain_conv2d
from .dispatch import autocasts, eager_on_cpu, has_fast_gemm, is_slow
from .feed_forward import conv2d_gelu, feed_forward, infers_on_cpu, plain_conv2d_gelu, plain_feed_forward
from .linear import Linear, linear, plain_linear, speed_up_linear_layers
from .private_torch import in_backward

__all__ = [
    "Linear",
    "autocasts",
    "conv2d",
    "conv2d_gelu",
    "eager_on_cpu",
    "feed_forward",
    "has_fast_gemm",
    "in_backward",
    "infers_on_cpu",
    "is_slow",
    "linear",
    "plain_conv2d",
    "plain_conv2d_gelu",
    "plain_feed_forward",
    "plain_linear",
    "speed_up_linear_layers",
]
