# SPDX-License-Identifier: Apache-2.0
"""Private names of PyTorch, all in one place; if one is missing, the plain form runs.

The `HAS_…` flags are set at import: builds without oneDNN lack some names, and any version may rename them. A test
reports which names exist, and that the code computes the same without them.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "HAS_INT4_GEMM",
    "HAS_INT8_GEMM",
    "HAS_POINTWISE_CONVOLUTIONS",
    "convolution_add",
    "convolution_gelu",
    "in_backward",
    "int4_gemm",
    "int8_gemm",
    "onednn_takes",
    "packed_int4",
    "transforms_are_active",
]

_MKLDNN: Any = torch.ops.mkldnn
_ATEN: Any = torch.ops.aten
_TAKES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}

HAS_POINTWISE_CONVOLUTIONS = hasattr(_MKLDNN, "_convolution_pointwise")
HAS_INT8_GEMM = hasattr(torch, "_weight_int8pack_mm")
HAS_INT4_GEMM = hasattr(torch, "_weight_int4pack_mm_for_cpu") and hasattr(_ATEN, "_convert_weight_to_int4pack_for_cpu")
_TRANSFORMS = getattr(torch._C, "_are_functorch_transforms_active", None)
_GRAPH_TASK = getattr(torch._C, "_current_graph_task_id", None)


def transforms_are_active() -> bool:
    """Return whether a functional transform, such as `torch.func.vmap`, is active; False if unknown."""
    return _TRANSFORMS is not None and bool(_TRANSFORMS())


def in_backward() -> bool:
    """Return whether this is called from within a backward pass; False if unknown."""
    return _GRAPH_TASK is not None and _GRAPH_TASK() != -1


def onednn_takes(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has fast bfloat16 or float16 GEMMs on this CPU; False if unknown."""
    supported = getattr(_MKLDNN, _TAKES[dtype], None)
    return supported is not None and bool(supported())


def _geometry(stride: int, padding: int, groups: int) -> tuple[Any, ...]:
    return [padding, padding], [stride, stride], [1, 1], groups


def convolution_gelu(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """Return gelu(convolution) by one kernel of oneDNN, all in one dtype; needs `HAS_POINTWISE_CONVOLUTIONS`."""
    geometry = _geometry(stride, padding, groups)
    result: Tensor = _MKLDNN._convolution_pointwise(input, weight, bias, *geometry, "gelu", [], "none")
    return result


def convolution_add(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return residual + pointwise convolution by one kernel of oneDNN; needs `HAS_POINTWISE_CONVOLUTIONS`."""
    result: Tensor = _MKLDNN._convolution_pointwise.binary(
        input, residual, weight, bias, *_geometry(1, 0, 1), "add", 1.0, None, [], None
    )
    return result


def int8_gemm(rows: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
    """Return bfloat16 (rows, out) from (rows, in), integers (out, in), scales (out,); needs `HAS_INT8_GEMM`."""
    return torch._weight_int8pack_mm(rows, integers, scales)


def packed_int4(integers: Tensor) -> Tensor:
    """Pack integers (out, in) from 0 to 15 for `int4_gemm`, two per byte; needs `HAS_INT4_GEMM`."""
    packed: Tensor = _ATEN._convert_weight_to_int4pack_for_cpu(integers, 1)
    return packed


def int4_gemm(rows: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    """Return bfloat16 (rows, out) from (rows, in) and packed integers with a scale and an offset per group."""
    return torch._weight_int4pack_mm_for_cpu(rows, packed, group, scales)
