# SPDX-License-Identifier: Apache-2.0
"""Convolutions on the CPU, expressed by operations for which oneDNN has fast kernels.

- 1x1: a matrix multiplication, whose backward pass is also a GEMM.
- Depthwise with several outputs per channel (between stages): one convolution for each output, in float32 so that the
  sum of their gradients is rounded once.
- Gradients of depthwise kernels wider than 3, on CPUs with 256-bit vectors: strips of 3 columns, since the fast kernel
  holds a row of the gradient in registers, which are too few for wider rows.
- Gradients of depthwise kernels get the memory layout of the kernels; otherwise DistributedDataParallel warns.
- Half precision on CPUs without instructions for it: computed in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .dispatch import autocasts, eager_on_cpu, has_fast_gemm, result_dtype, vector_width
from .linear import linear

_STRIP = 3
_LAST = torch.channels_last


def plain_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """Return `F.conv2d` in the dtype of `input`, whatever the weights' dtype; under autocast in autocast's dtype."""
    if weight.dtype != input.dtype and not autocasts(input):
        weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
    return F.conv2d(input, weight, bias, stride, padding, 1, groups)


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """Return the result of `plain_conv2d`, of shape (batch, out, height', width').

    `input` has shape (batch, in, height, width), `weight` (out, in / groups, k, k) and `bias` (out,).
    """
    if not eager_on_cpu(input, weight, bias):
        return plain_conv2d(input, weight, bias, stride, padding, groups)
    if input.shape[0] == 1 and input.stride(0) != input.numel() and input.is_contiguous(memory_format=_LAST):
        input = channels_first(input.permute(0, 2, 3, 1))
    pointwise = groups == 1 and stride == 1 and weight.shape[2:] == (1, 1)
    if pointwise and input.is_contiguous(memory_format=_LAST):
        return channels_first(linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias))
    dtype = result_dtype(input)
    trains_depthwise = weight.requires_grad and weight.shape[1] == 1 < groups
    if has_fast_gemm(dtype) and not (trains_depthwise or _has_multiplier(weight, groups)):
        return plain_conv2d(input, weight, bias, stride, padding, groups)
    return _Convolution.apply(input, weight, bias, stride, padding, groups, dtype)


def _has_multiplier(weight: Tensor, groups: int) -> bool:
    """Return whether a convolution is depthwise with several outputs per channel and splitting it is faster here."""
    return weight.shape[1] == 1 and weight.shape[0] > groups > 1 and vector_width() > 0


def _in_strips(weight: Tensor, stride: int, groups: int, dtype: torch.dtype) -> bool:
    """Return whether computing the gradient of a depthwise kernel in strips is faster."""
    depthwise = weight.shape[0] == groups > 1 and stride == 1
    return depthwise and weight.shape[-1] > _STRIP and dtype == torch.float32 and vector_width() == 256


class _Convolution(torch.autograd.Function):
    """A convolution with results in `dtype`, computed in float32 if this CPU is slow in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: int,
        groups: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry = stride, padding, groups
        ctx.bias_dtype = None if bias is None else bias.dtype
        step = _number_of_parts(weight, groups)
        half = dtype in (torch.bfloat16, torch.float16)
        ctx.compute = compute = torch.float32 if half and (step > 1 or not has_fast_gemm(dtype)) else dtype
        input, weight = input.to(compute), weight.to(compute)
        bias = None if bias is None else bias.to(compute)
        with torch.autocast("cpu", enabled=False):
            parts = [
                F.conv2d(input, weight[m::step], None if bias is None else bias[m::step], stride, padding, 1, groups)
                for m in range(step)
            ]
        return _interleave(parts).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        operands = grad.to(ctx.compute), input.to(ctx.compute), weight.to(ctx.compute), *ctx.geometry
        return (
            _grad_input(*operands).to(input.dtype) if needs_input else None,
            _laid_out_as(weight, _grad_weight(*operands).to(weight.dtype)) if needs_weight else None,
            operands[0].sum((0, 2, 3)).to(ctx.bias_dtype) if needs_bias else None,
            *[None] * 4,
        )


def _number_of_parts(weight: Tensor, groups: int) -> int:
    """Return the number of convolutions, with one output per channel each, that this one is split into."""
    return weight.shape[0] // groups if _has_multiplier(weight, groups) else 1


def _interleave(parts: list[Tensor]) -> Tensor:
    """Interleave maps (batch, channels, height, width): output m of channel c becomes channel c * len(parts) + m."""
    if len(parts) == 1:
        return parts[0]
    return channels_first(torch.stack([part.permute(0, 2, 3, 1) for part in parts], -1).flatten(-2))


def channels_first(maps: Tensor) -> Tensor:
    """Return (batch, height, width, channels) as (batch, channels, height, width), with channels last in memory.

    `view` gives a batch of one a proper stride, by which convolutions recognise channels last.
    """
    return maps.reshape(-1, maps.shape[-1]).view(maps.shape).permute(0, 3, 1, 2)


def _grad_input(grad: Tensor, input: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    step = _number_of_parts(weight, groups)
    total = None
    for m in range(step):
        part, _, _ = torch.ops.aten.convolution_backward(
            grad[:, m::step].contiguous(memory_format=_LAST) if step > 1 else grad,
            input,
            weight[m::step],
            *_arguments((padding, padding), stride, groups),
            [True, False, False],
        )
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _grad_weight(grad: Tensor, input: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    def of(input: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        arguments = _arguments(padding, stride, groups)
        return torch.ops.aten.convolution_backward(grad, input, weight, *arguments, [False, True, False])[1]

    if not _in_strips(weight, stride, groups, grad.dtype):
        return of(input, weight, (padding, padding))
    padded = F.pad(input, (padding, padding, 0, 0))
    strips = []
    for start in range(0, weight.shape[-1], _STRIP):
        columns = weight[..., start : start + _STRIP]
        seen = padded[..., start : start + grad.shape[-1] + columns.shape[-1] - 1]
        strips.append(of(seen.contiguous(memory_format=_LAST), columns, (padding, 0)))
    return torch.cat(strips, -1)


def _laid_out_as(weight: Tensor, grad: Tensor) -> Tensor:
    """Return `grad` with the strides of `weight`: oneDNN chooses other strides for the input dimension of size 1."""
    if weight.stride() == grad.stride() or weight.shape[1] > 1 or not weight.is_contiguous():
        return grad
    return grad.contiguous().view(-1).view(grad.shape)


def _arguments(padding: tuple[int, int], stride: int, groups: int) -> tuple[Any, ...]:
    """Return the arguments of `aten.convolution_backward` between its tensors and its mask."""
    return [0], [stride, stride], list(padding), [1, 1], False, [0, 0], groups
