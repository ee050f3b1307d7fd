# SPDX-License-Identifier: Apache-2.0
"""Products with weights that torchao holds in 8 or 4 bits, in bfloat16 on CPUs.

torchao 0.18 turns the whole matrix into bfloat16 for every token there. PyTorch
has products that read the small integers, fast for the few rows of decoding; for the many rows of a prompt the matrix
is turned into float32 where the CPU has no fast products of bfloat16. The plain form is `nn.Linear` by torchao.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import private_torch
from .dispatch import eager_on_cpu, has_fast_products
from .linear import float32_linear

# With more rows than this, turning the matrix into float32 once is shared by enough of them.
_MAX_ROWS = 32
_GROUPS = (32, 64, 128, 256)  # inputs that share a scale, as the 4-bit kernel takes them
_OUTPUTS = 32  # it takes multiples of this many outputs


class QuantizedLinear(nn.Linear):
    """`nn.Linear` with a weight that torchao has quantized; made by `speed_up_quantized_layers`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out) from (..., in)."""
        weight: Any = self.weight
        bias = self.bias
        if not _applies(input, weight, bias):
            return super().forward(input)
        rows = input.reshape(-1, input.shape[-1])
        if rows.shape[0] > _MAX_ROWS:
            if has_fast_products(input.dtype):
                return super().forward(input)
            return float32_linear(input, weight, lambda block: _float32_rows(weight, block), bias, input.dtype)
        out = self._product(rows, weight)
        if bias is not None:
            out += bias
        return out.view(*input.shape[:-1], out.shape[-1])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop("_packed", None)  # values are written into the tensors that are there
        super()._load_from_state_dict(*args, **kwargs)

    def _product(self, rows: Tensor, weight: Any) -> Tensor:
        # Asking a tensor of torchao's for as little as its shape takes longer than a small product.
        packed = self.__dict__.get("_packed")
        if packed is None or packed[0] is not weight.qdata:
            packed = self.__dict__["_packed"] = (weight.qdata, *_pack(weight))
        _, integers, scales, group = packed
        if group:
            return private_torch.int4_product(rows, integers, group, scales)
        return private_torch.int8_product(rows, integers, scales)


def _pack(weight: Any) -> tuple[Tensor, Tensor, int]:
    """Return integers and bfloat16 scales as the kernels take them, and the size of a group of 4-bit weights or 0.

    In 8 bits the integers are those of the weight itself, with (out,) scales; in 4 two integers a byte, and (groups,
    out, 2) scales and offsets. Rounding the scales adds no more error than torchao's rounding of the whole matrix.
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
    """Return 8 or 4 for weights quantized alone, row by row or in groups of a row, and 0 for any others."""
    kind = type(weight).__name__
    if kind == "Int8Tensor":
        plain = weight.act_quant_kwargs is None and weight.act_pre_scale is None
        by_row = tuple(weight.block_size) == (1, weight.shape[-1])
        symmetric = weight.zero_point is None or not weight.zero_point.any()
        return 8 if private_torch.HAS_INT8_PRODUCTS and plain and by_row and symmetric else 0
    if kind == "IntxUnpackedToInt8Tensor" and str(weight.target_dtype) == "torch.int4":
        fits = weight.block_size[0] == 1 and weight.block_size[1] in _GROUPS and weight.shape[0] % _OUTPUTS == 0
        return 4 if private_torch.HAS_INT4_PRODUCTS and fits and weight.activation_quantization is None else 0
    return 0


def _applies(input: Tensor, weight: Any, bias: Tensor | None) -> bool:
    learns = torch.is_grad_enabled() and input.requires_grad
    if input.dtype != torch.bfloat16 or learns or torch.is_autocast_enabled("cpu"):
        return False
    return hasattr(weight, "qdata") and eager_on_cpu(input, weight.qdata, bias)


def speed_up_quantized_layers(model: nn.Module) -> None:
    """Make those `nn.Linear` layers of `model` that torchao has quantized compute as above, where they can."""
    for module in model.modules():
        if type(module) is nn.Linear and _bits(module.weight):
            module.__class__ = QuantizedLinear  # the only difference is `forward`, and nothing else is lost
