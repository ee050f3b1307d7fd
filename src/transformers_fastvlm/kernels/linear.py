# SPDX-License-Identifier: Apache-2.0
"""Matrix multiplications on CPUs without half-precision instructions: stored in half precision, computed in float32."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .dispatch import autocasts, eager_on_cpu, has_fast_gemm, is_recorded, result_dtype

# From about this many rows on, converting the matrix to float32 is faster.
_MIN_ROWS = 8
# Elements of a matrix converted at a time, however large the vocabulary: 16 MB of float32 can stay in the CPU's cache,
# and need not be allocated from the system each time.
_BLOCK = 1 << 22


def plain_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear` in the dtype of `input`, whatever the weights' dtype; under autocast in autocast's dtype."""
    if weight.dtype == input.dtype or autocasts(input):
        return F.linear(input, weight, bias)
    return F.linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return (..., out) from `input` (..., in), `weight` (out, in) and `bias` (out,), as `plain_linear`."""
    # A decoding step makes hundreds of GEMMs with one row each, so the cheapest check comes first.
    if type(input) is Tensor and not is_recorded() and input.numel() < _MIN_ROWS * input.shape[-1]:
        return plain_linear(input, weight, bias)
    if not eager_on_cpu(input, weight, bias):
        return plain_linear(input, weight, bias)
    dtype = result_dtype(input)
    if has_fast_gemm(dtype):
        return plain_linear(input, weight, bias)
    return _Float32Linear.apply(input, weight, bias, dtype)


def float32_linear(
    input: Tensor, weight: Tensor, float32_rows: Callable[[slice], Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return `linear` in `dtype`, computed in float32 from the rows of `weight` that `float32_rows` returns."""
    rows = input.reshape(-1, input.shape[-1]).float()
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=dtype)
    with torch.autocast("cpu", enabled=False):
        for block in _blocks(weight):
            out[:, block] = F.linear(rows, float32_rows(block), None if bias is None else bias[block].float())
    return out.view(*input.shape[:-1], weight.shape[0])


class _Float32Linear(torch.autograd.Function):
    """`F.linear` of half-precision tensors, computed in float32, with results in `dtype`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return float32_linear(input, weight, lambda block: weight[block].float(), bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1]).float()
        inputs = input.reshape(-1, input.shape[-1]).float() if needs_weight else rows
        grad_input = torch.zeros(rows.shape[0], weight.shape[1]) if needs_input else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(weight):
                if grad_input is not None:
                    grad_input.addmm_(rows[:, block], weight[block].float())
                if grad_weight is not None:
                    grad_weight[block] = rows[:, block].t() @ inputs
        return (
            None if grad_input is None else grad_input.to(input.dtype).view(input.shape),
            grad_weight,
            rows.sum(0).to(ctx.bias_dtype) if needs_bias else None,
            None,
        )


def _blocks(weight: Tensor) -> list[slice]:
    """Return slices of the rows of `weight` (out, in), of similar length and at most `_BLOCK` elements or one row."""
    rows, columns = weight.shape
    parts = math.ceil(rows / max(1, _BLOCK // max(columns, 1)))
    step = math.ceil(rows / max(parts, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, max(step, 1))]


class Linear(nn.Linear):
    """`nn.Linear` with `linear`: computes in the dtype of its input, also if its weights have a smaller one."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.__dict__.get("_was_plain") and self.weight.device.type != "cpu":
            del self.__dict__["_was_plain"]
            self.__class__ = nn.Linear  # type: ignore[assignment]
        return self


def speed_up_linear_layers(model: nn.Module) -> None:
    """Replace `nn.Linear` by `Linear` in `model` for layers whose dtype has no fast GEMM on this CPU.

    Other layers (quantized, with adapters, on another device or in another dtype) do not change, so most machines keep
    all layers.
    """
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.device.type == "cpu":
            if not has_fast_gemm(module.weight.dtype):
                module.__dict__["_was_plain"] = True  # restored when the layer leaves the CPU
                module.__class__ = Linear  # only `forward` differs; hooks and ties are kept
