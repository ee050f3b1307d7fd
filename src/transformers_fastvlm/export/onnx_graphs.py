# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs of a model's parts, with the inputs and outputs that transformers.js expects, and saving them.

A graph refers to the model's weights in their original dtype. They are read, converted and saved one by one, so no
precision needs a copy of the model.
"""

import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from . import programs

__all__ = ["OPSET", "decoder_graph", "embedding_graph", "save_graph", "vision_graph"]

OPSET = 21
EXTERNAL_ABOVE = 1_500_000_000
"""Bytes above which weights are stored externally: protobuf files and browser buffers are limited to 2 GB."""

_BATCH = "batch_size"


def vision_graph(model: Any) -> Any:
    """Return `VisionEncoder` as an `onnx_ir.Model`, in the dtypes of its weights: pixel_values to image_features.

    Keep the model alive and unchanged until the graph is saved; this holds for all graphs.
    """
    return _graph(
        model,
        None,
        programs.export_vision,
        {"pixel_values": {0: _BATCH, 2: "height", 3: "width"}},
        {"image_features": {0: _BATCH, 1: "num_image_tokens"}},
    )


def embedding_graph(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Return `TokenEmbedding` as an `onnx_ir.Model`: input_ids to inputs_embeds.

    Args:
        dtype: of the graph's weights; by default the model's.
    """
    dimensions = {0: _BATCH, 1: "sequence_length"}
    return _graph(model, dtype, programs.export_embedding, {"input_ids": dimensions}, {"inputs_embeds": dimensions})


def decoder_graph(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Return `Decoder` as an `onnx_ir.Model`: one graph for the prompt, with a past of length 0, and for decoding.

    It has one more input, the scalar `num_logits_to_keep`: the number of last positions with logits, or 0 for all.

    Args:
        dtype: of the graph's weights; by default the model's.
    """
    layers = range(model.config.text_config.num_hidden_layers)
    new = {0: _BATCH, 1: "sequence_length"}
    inputs = {"inputs_embeds": new, "attention_mask": {0: _BATCH, 1: "total_sequence_length"}, "position_ids": new}
    kinds = ("key", "value")
    inputs |= {f"past_key_values.{i}.{kind}": {0: _BATCH, 2: "past_sequence_length"} for i in layers for kind in kinds}
    outputs = {"logits": {0: _BATCH, 1: "num_logits"}}
    outputs |= {f"present.{i}.{kind}": {0: _BATCH, 2: "total_sequence_length"} for i in layers for kind in kinds}
    graph = _graph(model, dtype, programs.export_decode, inputs, outputs)
    _choose_positions(graph.graph)
    _divide_by_roots(graph.graph)
    return graph


def _divide_by_roots(graph: Any) -> None:
    """Replace x * (1 / sqrt(y)) by x / sqrt(y), as which onnxruntime knows the norm and computes it at once."""
    import onnx_ir as ir

    for inverse in [node for node in graph if node.op_type == "Reciprocal"]:
        for product in inverse.outputs[0].consumers():
            if product.op_type != "Mul" or inverse.inputs[0].producer().op_type != "Sqrt":
                continue
            (factor,) = [value for value in product.inputs if value is not inverse.outputs[0]]
            quotient = ir.node("Div", [factor, inverse.inputs[0]])
            ir.convenience.replace_nodes_and_values(
                graph, product, [product], [quotient], product.outputs, quotient.outputs
            )
        if not inverse.outputs[0].uses():
            graph.remove(inverse, safe=True)


def _choose_positions(graph: Any) -> None:
    """Slice the head's input to the last `num_logits_to_keep` positions.

    torch.export could do so only with the number as a dimension, not as the tensor that transformers.js feeds.
    """
    import onnx_ir as ir

    head = next(value for value in graph.outputs if value.name == "logits").producer()
    while head.op_type != "MatMul":
        head = head.inputs[0].producer()

    def constant(name: str, number: int) -> Any:
        tensor = ir.tensor([number], dtype=ir.DataType.INT64, name=f"num_logits_to_keep.{name}")
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        return value

    count = ir.Value(name="num_logits_to_keep", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(count)
    end, one = constant("end", torch.iinfo(torch.int64).max), constant("one", 1)
    negative = ir.node("Neg", [count])
    start = ir.node("Reshape", [negative.outputs[0], one])
    kept = ir.node("Slice", [head.inputs[0], start.outputs[0], end, one])  # along axis 1
    graph.insert_before(head, [negative, start, kept])
    head.replace_input_with(0, kept.outputs[0])


def _graph(
    model: Any,
    dtype: torch.dtype | None,
    export: Callable[[Any], ExportedProgram],
    inputs: dict[str, dict[int, str]],
    outputs: dict[str, dict[int, str]],
) -> Any:
    """Translate a part, and name its inputs, outputs and their free dimensions."""
    import onnx_ir as ir

    # The exporter logs its progress, its optimiser's passes and hints about optional packages.
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with _placeholders(model, dtype) as weights:
        program = export(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        translated = torch.onnx.export(program, opset_version=OPSET, dynamo=True, verbose=False, optimize=False)
        assert translated is not None
        _refer_to_weights(translated.model.graph, program, weights)
        # Done before the optimiser runs, which would keep every transposed matrix in memory.
        _lay_out_weights(translated.model.graph)
        translated.optimize()
    graph = translated.model.graph
    _forget_the_origin(graph)
    for values, wanted in ((graph.inputs, inputs), (graph.outputs, outputs)):
        if len(values) != len(wanted):
            raise RuntimeError(f"The graph has {len(values)} inputs or outputs; expected {', '.join(wanted)}.")
    # Drop intermediate shapes: the exporter uses other names for free dimensions, and shapes may be wrong where its
    # optimiser has moved an operation.
    for node in graph:
        for value in node.outputs:
            value.shape = None if value not in graph.outputs else value.shape
    for values, wanted in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, (name, dimensions) in zip(values, wanted.items(), strict=True):
            value.name = name
            value.shape = ir.Shape([dimensions.get(axis, size) for axis, size in enumerate(value.shape)])
    return translated.model


@contextlib.contextmanager
def _placeholders(model: nn.Module, dtype: torch.dtype | None) -> Iterator[dict[int, nn.Parameter]]:
    """Replace a model's parameters by empty ones of dtype `dtype`, by default the original one. They take no memory,
    since nothing is written to them. The exporter needs only their shapes, and any reference that it keeps is to the
    empty ones. Buffers keep their dtype, as in `generate`: in float16 the rotary frequencies would be inexact.

    Yields:
        the original parameters by the address of their replacements.
    """
    stand_ins: dict[nn.Parameter, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if weight not in stand_ins:
                    empty = torch.empty_like(weight, dtype=dtype, requires_grad=False)
                    stand_ins[weight] = nn.Parameter(empty, requires_grad=False)
                replaced.append((module, name, weight))
                setattr(module, name, stand_ins[weight])
        yield {stand_in.data_ptr(): weight for weight, stand_in in stand_ins.items()}
    finally:
        for module, name, weight in replaced:
            setattr(module, name, weight)


def _refer_to_weights(graph: Any, program: ExportedProgram, weights: dict[int, nn.Parameter]) -> None:
    """Make a graph's initialisers refer to the original weights."""
    import onnx_ir as ir

    parameters = dict(program.named_parameters())
    for name in parameters.keys() & graph.initializers.keys():
        value = graph.initializers[name]
        dtype, stands_for = parameters[name].dtype, weakref.ref(weights[parameters[name].data_ptr()])

        def read(
            name: str = name, dtype: torch.dtype = dtype, stands_for: weakref.ref[nn.Parameter] = stands_for
        ) -> Any:
            weight = stands_for()
            if weight is None:
                raise RuntimeError(f"The model was deleted before {name} was saved; save its graphs first.")
            return ir.tensor_adapters.TorchTensor(weight.detach().to(dtype), name=name)

        value.const_value = ir.LazyTensor(read, value.dtype, value.shape, name=name)


def _forget_the_origin(graph: Any) -> None:
    """Remove the exporter's metadata, which contains local source paths."""
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _lay_out_weights(graph: Any) -> None:
    """Transpose matrices when they are saved instead of at every start of the graph."""
    import numpy as np
    import onnx_ir as ir

    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or weight.shape.rank() != 2:
            continue
        tensor = weight.const_value
        shape = ir.Shape([tensor.shape[1], tensor.shape[0]])
        name = f"{weight.name}.transposed"
        transposed = graph.initializers.get(name)
        if transposed is None:
            lazy = ir.LazyTensor(
                lambda tensor=tensor: ir.Tensor(np.ascontiguousarray(tensor.numpy().T)), tensor.dtype, shape, name=name
            )
            transposed = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy)
            graph.register_initializer(transposed)
        node.outputs[0].replace_all_uses_with(transposed)
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[weight.name]


def save_graph(model: Any, path: Path, external_data: bool | None) -> bool:
    """Write a graph to `path`, with its weights inside or in `<path>_data`, and return whether they are external.

    Raises:
        ValueError: the weights are too large to store inside.
    """
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    external = size > EXTERNAL_ABOVE if external_data is None else external_data
    if size > EXTERNAL_ABOVE and not external:
        raise ValueError(
            f"{path.name} has {size / 1e9:.1f} GB of weights, too many for one ONNX file. Leave external_data out, "
            "or choose a smaller precision."
        )
    if external:
        ir.save(model, path, external_data=f"{path.name}_data")
    else:
        _save_with_weights(model, path)
    return external


def _save_with_weights(model: Any, path: Path) -> None:
    """Write an ONNX file with its weights inside, one by one; protobuf would need twice their size in memory."""
    import numpy as np
    import onnx
    import onnx_ir as ir

    values = list(model.graph.initializers.values())
    tensors = [value.const_value for value in values]
    nothing = ir.Tensor(np.empty(0, dtype=np.uint8))
    try:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = ir.LazyTensor(lambda: nothing, tensor.dtype, tensor.shape, name=value.name)
        proto = ir.to_proto(model)
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor
    # The fields of a protobuf message may be in any order. Here a tensor ends with its data, the graph with its
    # tensors, and the file with its graph.
    heads = []
    for head, tensor in zip(proto.graph.initializer, tensors, strict=True):
        head.ClearField("raw_data")
        content = head.SerializeToString() + _head(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, tensor.nbytes)
        size = len(content) + tensor.nbytes
        heads.append(_head(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, size) + content)
    proto.graph.ClearField("initializer")
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    size = len(graph) + sum(len(head) + tensor.nbytes for head, tensor in zip(heads, tensors, strict=True))
    with path.open("wb") as file:
        file.write(proto.SerializeToString() + _head(onnx.ModelProto.GRAPH_FIELD_NUMBER, size) + graph)
        for head, tensor in zip(heads, tensors, strict=True):
            file.write(head)
            tensor.tofile(file)


def _head(field: int, size: int) -> bytes:
    """Return the header of a field of `size` bytes in protobuf's encoding."""
    found = bytearray()
    for number in (field << 3 | 2, size):
        while number > 127:
            found.append(number & 127 | 128)
            number >>= 7
        found.append(number)
    return bytes(found)
