# SPDX-License-Identifier: Apache-2.0
"""Quantization of an ONNX graph's weights to 8 or 4 bits, one tensor at a time while the graph is saved.

| | q8 | q4, q4f16 |
|---|---|---|
| matrices | 8 bits in blocks of 32, `MatMulNBits` | 4 bits in blocks of 32, `MatMulNBits` |
| embeddings | 8 bits a row | 8 bits a row |
| 1 x 1 convolutions | 8 bits a channel | 8 bits a channel in q4, float16 in q4f16 |

Quantization is asymmetric in blocks and symmetric in rows and channels, and rounds to nearest. Activations keep their
dtype between the operations, but a multiplication by a quantized matrix may round its own to 8 bits a block: the
runtimes' other kernels are slower, on CPUs most of all. The rest (biases, norms, depthwise kernels) is small and keeps
its precision.
"""

from collections.abc import Callable
from typing import Any

__all__ = ["quantize"]

BLOCK = 32
_INT8_ACTIVATIONS = 4
"""onnxruntime's `accuracy_level` of a multiplication whose activations may be rounded to 8 bits."""
ROWS_AT_ONCE = 4096
"""Rows of an embedding that are quantized at once: the whole table in float32 would be as large as the model."""


def quantize(model: Any, bits: int, convolutions: bool) -> Any:
    """Return a copy of an `onnx_ir.Model` with quantized weights.

    Args:
        model: not changed.
        bits: of the matrices, 8 or 4.
        convolutions: also quantize the kernels of 1 x 1 convolutions.
    """
    copy = model.clone()
    graph = copy.graph
    for node in list(graph):
        if node.op_type == "MatMul" and _is_weight(node.inputs[1], 2):
            _quantize_matrix(graph, node, bits)
        elif node.op_type == "Gather" and _is_weight(node.inputs[0], 2):
            _quantize_embedding(graph, node)
        elif convolutions and node.op_type == "Conv" and _is_weight(node.inputs[1], 4):
            if node.inputs[1].shape[2:] == (1, 1):
                _quantize_kernel(graph, node)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    copy.opset_imports.setdefault("com.microsoft", 1)
    return copy


def _is_weight(value: Any, rank: int) -> bool:
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    tensor = value.const_value
    return str(tensor.dtype) in ("FLOAT", "FLOAT16") and len(tensor.shape) == rank and tensor.size > BLOCK * BLOCK


class _Parts:
    """The tensors of one quantized weight: computed together, and freed when those of another weight are needed."""

    _last: tuple[Any, dict[str, Any]] | None = None

    def __init__(self, name: str, compute: Callable[[], dict[str, Any]]) -> None:
        self.name, self.compute = name, compute

    def part(self, kind: str) -> Any:
        last = _Parts._last
        if last is None or last[0] is not self:
            _Parts._last = None
            last = _Parts._last = (self, self.compute())
        return last[1][kind]

    def value(self, graph: Any, kind: str, dtype: Any, shape: list[int]) -> Any:
        """Register one of the tensors with the graph."""
        import onnx_ir as ir

        name = f"{self.name}.{kind}"
        if name in graph.initializers:
            return graph.initializers[name]
        lazy = ir.LazyTensor(lambda: ir.Tensor(self.part(kind)), dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=lazy)
        graph.register_initializer(value)
        return value


def _replace(graph: Any, node: Any, nodes: list[Any]) -> None:
    """Replace `node` by `nodes`; the last one's output replaces that of `node`."""
    import onnx_ir as ir

    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [new])


def _quantize_matrix(graph: Any, node: Any, bits: int) -> None:
    import onnx_ir as ir

    weight = node.inputs[1]
    tensor = weight.const_value
    depth, width = tensor.shape
    blocks = -(-depth // BLOCK)
    parts = _Parts(f"{weight.name}.q{bits}", lambda: _blockwise(tensor.numpy(), bits))
    inputs = [
        node.inputs[0],
        parts.value(graph, "weight", ir.DataType.UINT8, [width, blocks, BLOCK * bits // 8]),
        parts.value(graph, "scales", tensor.dtype, [width * blocks]),
        parts.value(graph, "zero_points", ir.DataType.UINT8, [width * -(-blocks * bits // 8)]),
    ]
    attributes = {"K": depth, "N": width, "bits": bits, "block_size": BLOCK, "accuracy_level": _INT8_ACTIVATIONS}
    _replace(graph, node, [ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name=node.name)])


def _blockwise(weight: Any, bits: int) -> dict[str, Any]:
    """Pack a (depth, width) matrix with onnxruntime's quantizer."""
    import numpy as np
    from onnxruntime.quantization.matmul_nbits_quantizer import quantize_matmul_4bits, quantize_matmul_8bits

    depth, width = weight.shape
    blocks = -(-depth // BLOCK)
    # The quantizer ignores strides, so the array must be contiguous.
    weight = np.ascontiguousarray(np.pad(weight, ((0, blocks * BLOCK - depth), (0, 0))))
    packed = np.zeros((width, blocks, BLOCK * bits // 8), dtype=np.uint8)
    scales = np.zeros((width, blocks), dtype=weight.dtype)
    zero_points = np.zeros((width, -(-blocks * bits // 8)), dtype=np.uint8)
    quantizer = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
    quantizer(packed, weight, scales, zero_points, BLOCK, width, depth, False)
    return {"weight": packed, "scales": scales.reshape(-1), "zero_points": zero_points.reshape(-1)}


def _by_first_axis(weight: Any, keep_axes: bool = False) -> dict[str, Any]:
    """Return int8 numbers and a scale for each index of the first axis, flat or with as many axes as the numbers."""
    import numpy as np

    scales = np.empty(len(weight), dtype=weight.dtype)
    numbers = np.empty((len(weight), weight[0].size), dtype=np.int8)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        rows = weight[part].reshape(-1, weight[0].size).astype(np.float32)
        largest = np.abs(rows).max(axis=1) / 127
        scales[part] = np.where(largest == 0, 1, largest)
        numbers[part] = np.clip(np.rint(rows / scales[part].astype(np.float32)[:, None]), -127, 127)
    shape = (-1, *[1] * (weight.ndim - 1)) if keep_axes else (-1,)
    return {"weight": numbers.reshape(weight.shape), "scales": scales.reshape(shape)}


def _quantize_embedding(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    table, ids = node.inputs
    tensor = table.const_value
    rows, width = tensor.shape
    parts = _Parts(f"{table.name}.q8", lambda: _by_first_axis(tensor.numpy(), keep_axes=True))
    numbers = ir.node("Gather", [parts.value(graph, "weight", ir.DataType.INT8, [rows, width]), ids])
    floats = ir.node("Cast", [numbers.outputs[0]], {"to": int(tensor.dtype)})
    scales = ir.node("Gather", [parts.value(graph, "scales", tensor.dtype, [rows, 1]), ids])
    scaled = ir.node("Mul", [floats.outputs[0], scales.outputs[0]])
    _replace(graph, node, [numbers, floats, scales, scaled])


def _quantize_kernel(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    weight = node.inputs[1]
    tensor = weight.const_value
    parts = _Parts(f"{weight.name}.q8", lambda: _by_first_axis(tensor.numpy()))
    inputs = [
        parts.value(graph, "weight", ir.DataType.INT8, list(tensor.shape)),
        parts.value(graph, "scales", tensor.dtype, [tensor.shape[0]]),
    ]
    kernel = ir.node("DequantizeLinear", inputs, {"axis": 0})
    kernel.outputs[0].shape, kernel.outputs[0].type = ir.Shape(list(tensor.shape)), ir.TensorType(tensor.dtype)
    graph.insert_before(node, kernel)
    node.replace_input_with(1, kernel.outputs[0])
