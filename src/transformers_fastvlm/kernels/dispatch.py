# SPDX-License-Identifier: Apache-2.0
"""When a fast form may stand in for the plain one: told by tensors, mode and machine, never by a processor's name."""

import functools

import torch
from torch import Tensor, nn

from .private_torch import HAS_POINTWISE_CONVOLUTIONS, onednn_takes, transforms_are_active


def is_recorded() -> bool:
    """Return whether a compiler, an exporter, a tracer or a functional transform records what is computed.

    They get the plain forms, since they optimise by themselves and a graph must not depend on the machine that it was
    made on.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_are_active()


def eager_on_cpu(*tensors: Tensor | None) -> bool:
    """Return whether all `tensors` are ordinary ones on the CPU and nothing records what is done to them.

    Subclasses of Tensor (fake, sharded, quantised) get the plain forms.
    """
    if is_recorded():
        return False
    for tensor in tensors:  # a layer asks this for every token: `all` of a generator would take twice as long
        if tensor is not None and not ((type(tensor) is Tensor or type(tensor) is nn.Parameter) and tensor.is_cpu):
            return False
    return True


@functools.cache
def _onednn_takes(dtype: torch.dtype) -> bool:
    return onednn_takes(dtype)


def has_fast_products(dtype: torch.dtype) -> bool:
    """Return whether this CPU has fast matrix products and convolutions of type `dtype`.

    Where it has not, PyTorch falls back to loops that are much slower than float32.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    return bool(torch.backends.mkldnn.enabled) and _onednn_takes(dtype)


@functools.cache
def vector_width() -> int:
    """Return the bits of a vector register that PyTorch uses on an x86 CPU: 512, 256, or 0 elsewhere."""
    return {"AVX2": 256, "AVX512": 512}.get(torch.backends.cpu.get_cpu_capability(), 0)


def has_fused_convolutions(dtype: torch.dtype) -> bool:
    """Return whether oneDNN's convolutions with activation and addition of type `dtype` are used on this CPU.

    They are with 512-bit vectors. With 256-bit ones a matrix product and an activation in the cache take their place.
    """
    mkldnn = torch.backends.mkldnn
    if not HAS_POINTWISE_CONVOLUTIONS or vector_width() != 512 or not (mkldnn.is_available() and mkldnn.enabled):
        return False
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and has_fast_products(dtype)


def autocasts(tensor: Tensor) -> bool:
    """Return whether autocast is on for the device of `tensor`; the meta device, which computes nothing, has none."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def result_dtype(input: Tensor) -> torch.dtype:
    """Return the type of what a matrix product or convolution of `input` gives, autocast considered."""
    return torch.get_autocast_dtype(input.device.type) if autocasts(input) else input.dtype


def is_slow(input: Tensor) -> bool:
    """Return whether products of `input` should be computed in float32, since this CPU has none of its type."""
    return eager_on_cpu(input) and not has_fast_products(result_dtype(input))
