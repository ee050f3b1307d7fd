# SPDX-License-Identifier: Apache-2.0
"""Tensors in MLX's format: safetensors in a floating-point dtype, with matrices quantized in groups along the rows."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from ..checkpoint_files import INDEX_FILE
from ..checkpoints.files import write_json

__all__ = ["quantization_of", "read_weights", "renamed", "write_weights"]

_BITS = {"q8": 8, "q4": 4}
_GROUP = 64
_SHARD_BYTES = 5 * 10**9


def quantization_of(precision: str) -> dict[str, Any] | None:
    """Return a precision's quantization for config.json, or None for a floating-point dtype."""
    bits = _BITS.get(precision)
    return None if bits is None else {"group_size": _GROUP, "bits": bits, "mode": "affine"}


def renamed(name: str, modules: tuple[tuple[str, str], ...], runtime: str) -> str:
    """Translate our name of a parameter to the runtime's name.

    Args:
        modules: pairs (our prefix, the runtime's prefix); the first match is used.
        runtime: name of the runtime in error messages.

    Raises:
        ValueError: no prefix matches.
    """
    for ours, theirs in modules:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{runtime} has no parameter for the tensor {name}.")


def write_weights(
    out: Path, tensors: dict[str, Tensor], dtype: str, quantization: dict[str, Any] | None, quantizable: str
) -> None:
    """Write tensors in MLX's safetensors, in shards of at most 5 GB before any quantization.

    Args:
        tensors: by the names in the file.
        dtype: "float32", "float16" or "bfloat16", of the tensors that are not quantized.
        quantization: None, or the value of `quantization_of`.
        quantizable: prefix of the names of matrices to quantize, including embeddings. Matrices whose row length is not
            a multiple of the group size are not quantized; MLX detects them.
    """
    import mlx.core as mx

    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_SHARD_BYTES,
    )
    weight_map: dict[str, str] = {}
    for file, names in plan.filename_to_tensors.items():
        arrays: dict[str, Any] = {}
        for name in names:
            arrays |= _arrays(name, tensors[name], dtype, quantization if name.startswith(quantizable) else None)
            mx.eval(list(arrays.values()))
        mx.save_safetensors(str(out / file), arrays, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(arrays, file)
    if plan.is_sharded:
        total = sum((out / file).stat().st_size for file in plan.filename_to_tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(out / INDEX_FILE, index)


def _arrays(name: str, tensor: Tensor, dtype: str, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Return a tensor as MLX arrays: itself, or packed values with a scale and a bias for each group."""
    import mlx.core as mx

    # MLX cannot read bfloat16 from NumPy; float32 represents all values of the dtypes in checkpoints.
    array = mx.array(tensor.detach().to(torch.float32).contiguous().numpy()).astype(getattr(mx, dtype))
    is_matrix = name.endswith(".weight") and tensor.ndim == 2 and tensor.shape[1] % _GROUP == 0
    if quantization is None or not is_matrix:
        return {name: array}
    packed, scales, biases = mx.quantize(array, group_size=quantization["group_size"], bits=quantization["bits"])
    path = name.removesuffix(".weight")
    return {f"{path}.weight": packed, f"{path}.scales": scales, f"{path}.biases": biases}


def read_weights(directory: Path, quantization: dict[str, Any] | None) -> dict[str, Callable[[], Tensor]]:
    """Return, for each tensor that `write_weights` was given, a function that reads it back as float32."""
    import mlx.core as mx
    import numpy as np

    arrays: dict[str, Any] = {}
    for file in sorted(directory.glob("*.safetensors")):
        arrays |= mx.load(str(file))

    def read(name: str) -> Tensor:
        array = arrays[name]
        path = name.removesuffix(".weight")
        if quantization is not None and f"{path}.scales" in arrays:
            scales, biases = arrays[f"{path}.scales"], arrays[f"{path}.biases"]
            array = mx.dequantize(array, scales, biases, quantization["group_size"], quantization["bits"])
        return torch.from_numpy(np.array(array.astype(mx.float32)))

    names = [name for name in arrays if not name.endswith((".scales", ".biases"))]
    return {name: functools.partial(read, name) for name in names}
