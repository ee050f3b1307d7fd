# SPDX-License-Identifier: Apache-2.0
"""Reading an .mlpackage back: is its interface as it should be, and what does its program compute?

The program's operations, read from the written files, are evaluated in PyTorch, each in float32 and its result rounded
to the type that the program declares. That checks all but Apple's kernels.
Source of the operations: the documentation of MIL in coremltools 9, `coremltools.converters.mil.mil.ops.defs`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["check_interface", "evaluate"]

_FLOAT32 = 65568  # ArrayFeatureType.FLOAT32 of Core ML's model format


def check_interface(package: Path, sizes: tuple[int, ...], channels: int) -> None:
    """Compare inputs and outputs with what `convert_encoder` promises.

    Raises:
        ValueError: they differ.
    """
    import coremltools as ct

    spec = ct.models.MLModel(str(package), skip_model_load=True).get_spec()
    (image,), (features,) = spec.description.input, spec.description.output
    array, output = image.type.multiArrayType, features.type.multiArrayType
    shapes = {tuple(shape.shape) for shape in array.enumeratedShapes.shapes} or {tuple(array.shape)}
    found = {
        "names": (image.name, features.name),
        "types": (array.dataType, output.dataType),
        "shapes": shapes,
        "default": tuple(array.shape),
    }
    expected = {
        "names": ("images", "image_features"),
        "types": (_FLOAT32, _FLOAT32),
        "shapes": {(1, 3, size, size) for size in sizes},
        "default": (1, 3, sizes[0], sizes[0]),
    }
    if len(sizes) == 1:
        found["output"] = tuple(output.shape)
        expected["output"] = (1, (sizes[0] // 64) ** 2, channels)
    if found != expected:
        raise ValueError(f"The package's interface is {found}, expected {expected}. Please report it.")


@torch.no_grad()
def evaluate(package: Path, images: Tensor) -> Tensor:
    """Compute the program of an .mlpackage in PyTorch.

    Args:
        package: as it was written.
        images: the program's only input.

    Returns:
        Its only output.

    Raises:
        ValueError: the program has an operation that this module does not know.
    """
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.converters.mil.mil import types

    model = ct.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    function = load(spec, spec.specificationVersion, model.weights_dir).functions["main"]
    (name,) = function.inputs
    values: dict[str, Any] = {name: images}
    for operation in function.operations:
        if operation.op_type == "const":
            continue
        compute = _OPERATIONS.get(operation.op_type)
        if compute is None:
            raise ValueError(f"The program has the operation {operation.op_type!r}, which is not known. Report it.")
        arguments = {key: _value(var, values) for key, var in operation.inputs.items() if var is not None}
        results = compute(arguments)
        for var, result in zip(operation.outputs, results if isinstance(results, list) else [results], strict=True):
            values[var.name] = result.half().float() if var.dtype == types.fp16 else result
    (output,) = function.outputs
    found: Tensor = values[output.name]
    return found


def _value(var: Any, values: dict[str, Any]) -> Any:
    """Return a constant, or what an earlier operation gave; float16 as float32."""
    import numpy as np

    if isinstance(var, list | tuple):
        return [_value(part, values) for part in var]
    if var.val is None:
        return values[var.name]
    if isinstance(var.val, str | bool):
        return var.val
    array = np.asarray(var.val)
    if array.dtype.kind in "US":
        return str(var.val)
    tensor = torch.as_tensor(np.ascontiguousarray(array).reshape(array.shape))
    return tensor.float() if tensor.is_floating_point() else tensor


def _ints(value: Any) -> list[int]:
    return [int(number) for number in torch.as_tensor(value).flatten()]


def _conv(a: dict[str, Any]) -> Tensor:
    kind = a["pad_type"]
    if kind not in ("custom", "valid"):
        raise ValueError(f"A convolution has pad_type {kind!r}; expected custom or valid.")
    top, bottom, left, right = _ints(a["pad"]) if kind == "custom" else (0, 0, 0, 0)
    x = F.pad(a["x"], [left, right, top, bottom])
    return F.conv2d(
        x, a["weight"], a.get("bias"), _ints(a["strides"]), 0, _ints(a["dilations"]), int(a.get("groups", 1))
    )


def _gelu(a: dict[str, Any]) -> Tensor:
    if a["mode"] != "EXACT":
        raise ValueError(f"A GELU has the mode {a['mode']!r}; expected EXACT.")
    return F.gelu(a["x"])


def _layer_norm(a: dict[str, Any]) -> Tensor:
    shape = [a["x"].shape[axis] for axis in _ints(a["axes"])]
    return F.layer_norm(a["x"], shape, a.get("gamma"), a.get("beta"), float(a["epsilon"]))


def _matmul(a: dict[str, Any]) -> Tensor:
    x = a["x"].transpose(-1, -2) if a.get("transpose_x") else a["x"]
    y = a["y"].transpose(-1, -2) if a.get("transpose_y") else a["y"]
    return torch.matmul(x, y)


def _split(a: dict[str, Any]) -> list[Tensor]:
    axis = int(a["axis"])
    if "split_sizes" in a:
        return list(torch.split(a["x"], _ints(a["split_sizes"]), axis))
    return list(torch.chunk(a["x"], int(a["num_splits"]), axis))


def _reshape(a: dict[str, Any]) -> Tensor:
    # 0 stands for the size as it is.
    shape = [size or a["x"].shape[axis] for axis, size in enumerate(_ints(a["shape"]))]
    return a["x"].reshape(shape)


def _gather(a: dict[str, Any]) -> Tensor:
    indices = torch.as_tensor(a["indices"]).long()
    taken = torch.index_select(a["x"], int(a["axis"]), indices.flatten())
    return taken if indices.ndim else taken.squeeze(int(a["axis"]))


def _concat(a: dict[str, Any]) -> Tensor:
    # Sizes come as numbers, which make a vector.
    return torch.cat([torch.atleast_1d(torch.as_tensor(part)) for part in a["values"]], int(a["axis"]))


_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "int32": torch.int32}
_OPERATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "add": lambda a: a["x"] + a["y"],
    "batch_norm": lambda a: F.batch_norm(
        a["x"], a["mean"], a["variance"], a.get("gamma"), a.get("beta"), eps=float(a["epsilon"])
    ),
    "cast": lambda a: a["x"].to(_TYPES[a["dtype"]]),
    "concat": _concat,
    "conv": _conv,
    "expand_dims": lambda a: a["x"][(None,)] if a["x"].ndim == 0 else a["x"].unsqueeze(_ints(a["axes"])[0]),
    "floor_div": lambda a: torch.div(a["x"], a["y"], rounding_mode="floor"),
    "gather": _gather,
    "gelu": _gelu,
    "identity": lambda a: a["x"],
    "layer_norm": _layer_norm,
    "linear": lambda a: F.linear(a["x"], a["weight"], a.get("bias")),
    "matmul": _matmul,
    "mul": lambda a: a["x"] * a["y"],
    "reduce_mean": lambda a: a["x"].mean(_ints(a["axes"]), keepdim=bool(a.get("keep_dims", False))),
    "relu": lambda a: F.relu(a["x"]),
    "reshape": _reshape,
    "shape": lambda a: torch.tensor(a["x"].shape, dtype=torch.int32),
    "sigmoid": lambda a: torch.sigmoid(a["x"]),
    "softmax": lambda a: torch.softmax(a["x"], int(a["axis"])),
    "split": _split,
    "squeeze": lambda a: a["x"].squeeze(tuple(_ints(a["axes"]))),
    "sub": lambda a: a["x"] - a["y"],
    "transpose": lambda a: a["x"].permute(_ints(a["perm"])),
}
