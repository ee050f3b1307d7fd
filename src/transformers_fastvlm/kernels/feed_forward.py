# SPDX-License-Identifier: Apache-2.0
"""Pointwise convolutions with exact GELU on CPUs, for inference only.

A feature map larger than the CPU's cache is written to memory and read back at each step, and PyTorch allocates every
large result from the system. So blocks of rows run through all steps in buffers that stay in the cache. On CPUs with
512-bit vectors, oneDNN's convolution includes activation and addition.

Activation: GELU, arXiv 1606.08415, section 2, the exact form with the error function.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .convolution import channels_first, conv2d, plain_conv2d
from .dispatch import eager_on_cpu, has_fast_gemm, has_fused_convolutions
from .private_torch import convolution_add, convolution_gelu

_LAST = torch.channels_last
# Positions in a block; with 1536 inner channels, 6 MB of float32.
_ROWS = 1024


def infers_on_cpu(*tensors: Tensor | None) -> bool:
    """Return whether the inference forms may be used: eager mode on a CPU, without gradients and autocast."""
    return eager_on_cpu(*tensors) and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def plain_conv2d_gelu(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """Return the exact GELU of `plain_conv2d`."""
    return F.gelu(plain_conv2d(input, weight, bias, stride, padding, groups))


def conv2d_gelu(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """Return the result of `plain_conv2d_gelu`, of shape (batch, out, height', width'); shapes as in `conv2d`."""
    if not infers_on_cpu(input, weight, bias) or not has_fast_gemm(input.dtype):
        return F.gelu(conv2d(input, weight, bias, stride, padding, groups))
    dtype = input.dtype
    if groups in (1, weight.shape[0]) and has_fused_convolutions(dtype):
        return _fused(input, weight, bias, stride, padding, groups)
    if groups == stride == 1 and weight.shape[2:] == (1, 1) and input.is_contiguous(memory_format=_LAST):
        rows = _rows_of(input)
        matrix = weight.flatten(1).to(dtype).t()
        bias = None if bias is None else bias.to(dtype)
        out = rows.new_empty(rows.shape[0], weight.shape[0])
        for start in range(0, rows.shape[0], _ROWS):
            part = out[start : start + _ROWS]
            torch.ops.aten.gelu_(_gemm(rows[start : start + _ROWS], matrix, bias, part))
        return channels_first(out.view(input.shape[0], *input.shape[2:], weight.shape[0]))
    return torch.ops.aten.gelu_(conv2d(input, weight, bias, stride, padding, groups))


def plain_feed_forward(
    input: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """Return residual + scale * conv_2(gelu(conv_1(input))), all maps of shape (batch, channels, height, width).

    `weight_1` has shape (inner, channels, 1, 1), `weight_2` (channels, inner, 1, 1), `scale` (channels, 1, 1) or None
    for 1.
    """
    branch = plain_conv2d(F.gelu(plain_conv2d(input, weight_1, bias_1)), weight_2, bias_2)
    return residual + (branch if scale is None else scale * branch)


def feed_forward(
    input: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """Return the result of `plain_feed_forward`, in the dtype of `input`; fast if `infers_on_cpu`.

    The fast form needs extra memory for 1024 positions only, whatever the size of the map.
    """
    dtype = input.dtype
    fast = infers_on_cpu(input, residual, scale, weight_1, weight_2) and has_fast_gemm(dtype)
    if not fast or not all(x.dtype == dtype and x.is_contiguous(memory_format=_LAST) for x in (input, residual)):
        branch = conv2d(F.gelu(conv2d(input, weight_1, bias_1)), weight_2, bias_2)
        return residual + (branch if scale is None else scale * branch)
    weight_2, bias_1, bias_2 = weight_2.to(dtype), bias_1.to(dtype), bias_2.to(dtype)
    factors = None if scale is None else scale.to(dtype).flatten()
    if factors is not None and input[:, 0].numel() > weight_2.shape[1]:
        # Cheaper than scaling the map.
        weight_2, bias_2, factors = weight_2 * factors.view(-1, 1, 1, 1), bias_2 * factors, None
    if has_fused_convolutions(dtype):
        inner = _fused(input, weight_1, bias_1)
        if factors is None:
            return convolution_add(inner, residual, weight_2, bias_2)
        return torch.addcmul(residual, factors.view(-1, 1, 1), conv2d(inner, weight_2, bias_2))
    matrix_1, matrix_2 = weight_1.flatten(1).to(dtype).t(), weight_2.flatten(1).t()
    rows, kept = _rows_of(input), _rows_of(residual)
    out = torch.empty_like(kept)
    buffer = rows.new_empty(min(_ROWS, rows.shape[0]), matrix_1.shape[1])
    for start in range(0, rows.shape[0], _ROWS):
        here = slice(start, start + _ROWS)
        inner = torch.ops.aten.gelu_(_gemm(rows[here], matrix_1, bias_1, buffer[: rows[here].shape[0]]))
        if factors is None:
            torch.add(kept[here], bias_2, out=out[here]).addmm_(inner, matrix_2)
        else:
            _gemm(inner, matrix_2, bias_2, out[here]).mul_(factors).add_(kept[here])
    return channels_first(out.view(residual.permute(0, 2, 3, 1).shape))


def _rows_of(maps: Tensor) -> Tensor:
    """Return a channels-last map as (positions, channels), without a copy."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _gemm(rows: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write rows @ matrix + bias to `out` and return it."""
    return torch.mm(rows, matrix, out=out) if bias is None else torch.addmm(bias, rows, matrix, out=out)


def _fused(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """Return GELU of a convolution, computed by one kernel of oneDNN."""
    bias = None if bias is None else bias.to(input.dtype)
    return convolution_gelu(input, weight.to(input.dtype), bias, stride, padding, groups)
