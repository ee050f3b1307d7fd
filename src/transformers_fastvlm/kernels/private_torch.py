# SPDX-License-Identifier: Apache-2.0
"""Names of PyTorch that it does not promise to keep, all in one place; where one is missing, the plain form runs.

`HAS_…` say at import what this build of PyTorch has: builds without oneDNN lack some, and another version may have
renamed any of them. A test says which are there, and that what goes without them computes the same.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "HAS_INT4_PRODUCTS",
    "HAS_INT8_PRODUCTS",
    "HAS_POINTWISE_CONVOLUTIONS",
    "convolution_add",
    "convolution_gelu",
    "in_backward",
    "int4_product",
    "int8_product",
    "onednn_takes",
    "packed_int4",
    "transforms_are_active",
]

_MKLDNN: Any = torch.ops.mkldnn
_ATEN: Any = torch.ops.aten
_TAKES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}

HAS_POINTWISE_CONVOLUTIONS = hasattr(_MKLDNN, "_convolution_pointwise")
HAS_INT8_PRODUCTS = hasattr(torch, "_weight_int8pack_mm")
HAS_INT4_PRODUCTS = hasattr(torch, "_weight_int4pack_mm_for_cpu") and hasattr(
    _ATEN, "_convert_weight_to_int4pack_for_cpu"
)
_TRANSFORMS = getattr(torch._C, "_are_functorch_transforms_active", None)
_GRAPH_TASK = getattr(torch._C, "_current_graph_task_id", None)


def transforms_are_active() -> bool:
    """Return whether a functional transform, such as `torch.func.vmap`, is at work; no if that cannot be told."""
    return _TRANSFORMS is not None and bool(_TRANSFORMS())


def in_backward() -> bool:
    """Return whether this is called from within a backward pass; no if that cannot be told."""
    return _GRAPH_TASK is not None and _GRAPH_TASK() != -1


def onednn_takes(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has fast products of bfloat16 or float16 on this CPU; no if that cannot be told."""
    supported = getattr(_MKLDNN, _TAKES[dtype], None)
    return supported is not None and bool(supported())


def _geometry(stride: int, padding: int, groups: int) -> tuple[Any, ...]:
    return [padding, padding], [stride, stride], [1, 1], groups


def convolution_gelu(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """Return gelu(convolution) by one kernel of oneDNN, all of one type; needs `HAS_POINTWISE_CONVOLUTIONS`."""
    geometry = _geometry(stride, padding, groups)
    result: Tensor = _MKLDNN._convolution_pointwise(input, weight, bias, *geometry, "gelu", [], "none")
    return result


def convolution_add(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return residual + pointwise convolution by one kernel of oneDNN; needs `HAS_POINTWISE_CONVOLUTIONS`."""
    result: Tensor = _MKLDNN._convolution_pointwise.binary(
        input, residual, weight, bias, *_geometry(1, 0, 1), "add", 1.0, None, [], None
    )
    return result


def int8_product(rows: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
    """Return (rows, out) of bfloat16 from (rows, in), integers (out, in) and scales (out,); `HAS_INT8_PRODUCTS`."""
    return torch._weight_int8pack_mm(rows, integers, scales)


def packed_int4(integers: Tensor) -> Tensor:
    """Return integers (out, in) from 0 to 15, two a byte, as `int4_product` takes them; needs `HAS_INT4_PRODUCTS`."""
    packed: Tensor = _ATEN._convert_weight_to_int4pack_for_cpu(integers, 1)
    return packed


def int4_product(rows: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    """Return (rows, out) of bfloat16 from (rows, in) and packed integers with a scale and an offset a group."""
    return torch._weight_int4pack_mm_for_cpu(rows, packed, group, scales)
