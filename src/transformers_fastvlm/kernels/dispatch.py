# SPDX-License-Identifier: Apache-2.0
"""When a fast form may replace the plain one: decided by tensors, mode and CPU features, never by a CPU's name."""

import functools

import torch
from torch import Tensor, nn

from .private_torch import HAS_POINTWISE_CONVOLUTIONS, onednn_takes, transforms_are_active


def is_recorded() -> bool:
    """Return whether a compiler, an exporter, a tracer or a functional transform records the computation.

    These get the plain forms: they optimise graphs themselves, and a graph must not depend on the machine that recorded
    it.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_are_active()


def eager_on_cpu(*tensors: Tensor | None) -> bool:
    """Return whether all `tensors` are ordinary CPU tensors and no graph is recorded.

    Subclasses of Tensor (fake, sharded, quantized) get the plain forms.
    """
    if is_recorded():
        return False
    for tensor in tensors:  # called by layers for every token: `all` of a generator takes twice as long
        if tensor is not None and not ((type(tensor) is Tensor or type(tensor) is nn.Parameter) and tensor.is_cpu):
            return False
    return True


@functools.cache
def _onednn_takes(dtype: torch.dtype) -> bool:
    return onednn_takes(dtype)


def has_fast_gemm(dtype: torch.dtype) -> bool:
    """Return whether this CPU has fast GEMMs and convolutions in `dtype`.

    Otherwise PyTorch falls back to loops that are much slower than float32.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    return bool(torch.backends.mkldnn.enabled) and _onednn_takes(dtype)


@functools.cache
def vector_width() -> int:
    """Return the bits of the vector registers that PyTorch uses on an x86 CPU, 512 or 256; 0 on other CPUs."""
    return {"AVX2": 256, "AVX512": 512}.get(torch.backends.cpu.get_cpu_capability(), 0)


def has_fused_convolutions(dtype: torch.dtype) -> bool:
    """Return whether to use oneDNN's convolutions with fused activation or addition in `dtype` on this CPU.

    They are used with 512-bit vectors. With 256-bit vectors, a GEMM and an activation in the CPU's cache replace them.
    """
    mkldnn = torch.backends.mkldnn
    if not HAS_POINTWISE_CONVOLUTIONS or vector_width() != 512 or not (mkldnn.is_available() and mkldnn.enabled):
        return False
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and has_fast_gemm(dtype)


def autocasts(tensor: Tensor) -> bool:
    """Return whether autocast is on for the device of `tensor`; False for the meta device."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def result_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype of the result of a GEMM or convolution of `input`, with autocast considered."""
    return torch.get_autocast_dtype(input.device.type) if autocasts(input) else input.dtype


def is_slow(input: Tensor) -> bool:
    """Return whether GEMMs of `input` should be computed in float32, since this CPU has no fast ones in its dtype."""
    return eager_on_cpu(input) and not has_fast_gemm(result_dtype(input))
