# SPDX-License-Identifier: Apache-2.0
"""Matrix multiplications with weights that torchao quantized to 8 or 4 bits, in bfloat16 on CPUs.

There torchao 0.18 dequantizes the whole matrix to bfloat16 for every token. PyTorch has GEMMs that read the integers
directly, which are fast for the few rows of decoding. For the many rows of a prompt the matrix is dequantized to
float32 if the CPU has no fast bfloat16 GEMMs. The plain form is torchao's `nn.Linear`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import private_torch
from .dispatch import eager_on_cpu, has_fast_gemm
from .linear import float32_linear

# With more rows than this, dequantizing the matrix to float32 once is faster.
_MAX_ROWS = 32
_GROUPS = (32, 64, 128, 256)  # group sizes that the 4-bit kernel supports: inputs that share a scale
_OUTPUTS = 32  # the 4-bit kernel needs a multiple of this many outputs


class QuantizedLinear(nn.Linear):
    """`nn.Linear` with a weight that torchao quantized; created by `speed_up_quantized_layers`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out) from (..., in)."""
        weight: Any = self.weight
        bias = self.bias
        if not _applies(input, weight, bias):
            return super().forward(input)
        rows = input.reshape(-1, input.shape[-1])
        if rows.shape[0] > _MAX_ROWS:
            if has_fast_gemm(input.dtype):
                return super().forward(input)
            return float32_linear(input, weight, lambda block: _float32_rows(weight, block), bias, input.dtype)
        out = self._gemm(rows, weight)
        if bias is not None:
            out += bias
        return out.view(*input.shape[:-1], out.shape[-1])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop("_packed", None)  # loading writes values into the existing tensors
        super()._load_from_state_dict(*args, **kwargs)

    def _gemm(self, rows: Tensor, weight: Any) -> Tensor:
        # Even reading the shape of a torchao tensor takes longer than a small GEMM.
        packed = self.__dict__.get("_packed")
        if packed is None or packed[0] is not weight.qdata:
            packed = self.__dict__["_packed"] = (weight.qdata, *_pack(weight))
        _, integers, scales, group = packed
        if group:
            return private_torch.int4_gemm(rows, integers, group, scales)
        return private_torch.int8_gemm(rows, integers, scales)


def _pack(weight: Any) -> tuple[Tensor, Tensor, int]:
    """Return integers and bfloat16 scales in the kernels' format, and the group size of 4-bit weights or 0.

    8-bit integers are the weight's own, with (out,) scales. 4-bit integers are packed two per byte, with (groups, out,
    2) scales and offsets. Rounding the scales adds no more error than torchao's rounding of the whole matrix.
    """
    if _bits(weight) == 8:
        return weight.qdata, weight.scale.view(-1).to(torch.bfloat16), 0
    integers = private_torch.packed_int4(weight.qdata.int() + 8)
    offsets = -weight.zero_point.float() * weight.scale.float()
    scales = torch.stack((weight.scale.float(), offsets), -1).transpose(0, 1).contiguous()
    return integers, scales.to(torch.bfloat16), weight.block_size[1]


def _float32_rows(weight: Any, block: slice) -> Tensor:
    """Return these rows of `weight` as float32."""
    scales = weight.scale[block].float().unsqueeze(-1)  # (out, groups, 1); in 8 bits a row is one group
    integers = weight.qdata[block].float().view(*scales.shape[:2], -1)
    if weight.zero_point is not None:
        integers -= weight.zero_point[block].unsqueeze(-1)
    return integers.mul_(scales).flatten(1)


def _bits(weight: Any) -> int:
    """Return 8 or 4 for weight-only quantization, by row or by groups of a row, and 0 for all others."""
    kind = type(weight).__name__
    if kind == "Int8Tensor":
        plain = weight.act_quant_kwargs is None and weight.act_pre_scale is None
        by_row = tuple(weight.block_size) == (1, weight.shape[-1])
        symmetric = weight.zero_point is None or not weight.zero_point.any()
        return 8 if private_torch.HAS_INT8_GEMM and plain and by_row and symmetric else 0
    if kind == "IntxUnpackedToInt8Tensor" and str(weight.target_dtype) == "torch.int4":
        fits = weight.block_size[0] == 1 and weight.block_size[1] in _GROUPS and weight.shape[0] % _OUTPUTS == 0
        return 4 if private_torch.HAS_INT4_GEMM and fits and weight.activation_quantization is None else 0
    return 0


def _applies(input: Tensor, weight: Any, bias: Tensor | None) -> bool:
    needs_gradient = torch.is_grad_enabled() and input.requires_grad
    if input.dtype != torch.bfloat16 or needs_gradient or torch.is_autocast_enabled("cpu"):
        return False
    return hasattr(weight, "qdata") and eager_on_cpu(input, weight.qdata, bias)


def speed_up_quantized_layers(model: nn.Module) -> None:
    """Replace `nn.Linear` by `QuantizedLinear` in `model` for layers that torchao quantized in a supported format."""
    for module in model.modules():
        if type(module) is nn.Linear and _bits(module.weight):
            module.__class__ = QuantizedLinear  # only `forward` and loading differ; everything else is kept
