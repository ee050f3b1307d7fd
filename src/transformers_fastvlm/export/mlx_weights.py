# SPDX-License-Identifier: Apache-2.0
"""Writing of tensors as MLX reads them: safetensors in a float type, with matrices quantized in groups of a row."""

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
    """Return what config.json says of a precision's quantization, or None if it is a float type."""
    bits = _BITS.get(precision)
    return None if bits is None else {"group_size": _GROUP, "bits": bits, "mode": "affine"}


def renamed(name: str, modules: tuple[tuple[str, str], ...], runtime: str) -> str:
    """Return a runtime's name of a parameter that has our name.

    Args:
        modules: pairs (our prefix, the runtime's); the first that fits counts.
        runtime: as an error calls it.

    Raises:
        ValueError: the runtime has no such part.
    """
    for ours, theirs in modules:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{runtime} has no place for the tensor {name}.")


def write_weights(
    out: Path, tensors: dict[str, Tensor], dtype: str, quantization: dict[str, Any] | None, quantizable: str
) -> None:
    """Write tensors in MLX's safetensors, in shards of at most 5 GB before any quantization.

    Args:
        tensors: by the names to write them under.
        dtype: "float32", "float16" or "bfloat16", of all that is not quantized.
        quantization: None, or as `quantization_of` returns it.
        quantizable: prefix of the names of the matrices that are quantized, embeddings included. Those whose rows are
            not a multiple of the group size stay as they are, which MLX finds out by itself.
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

    # MLX reads no bfloat16 from NumPy, and float32 holds every value of the types that checkpoints have.
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
