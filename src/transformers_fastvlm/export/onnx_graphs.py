# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs of a model's parts, with the inputs and outputs that transformers.js expects, and how they are saved.

A graph refers to the model's own tensors until it is saved, and then one tensor at a time is read: so several
precisions of a graph can be written without ever holding one in memory beside the model.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from .. import FastVLMForConditionalGeneration
from . import programs

__all__ = ["OPSET", "decoder_graph", "embedding_graph", "save_graph", "vision_graph"]

OPSET = 21
EXTERNAL_ABOVE = 1_500_000_000
"""Bytes of weights from which they go to a file of their own: protobuf ends at 2 GB, and so do buffers in browsers."""

_BATCH = "batch_size"


def vision_graph(model: FastVLMForConditionalGeneration) -> Any:
    """Return `VisionEncoder` as an `onnx_ir.Model`: pixel_values to image_features."""
    return _graph(
        programs.export_vision(model),
        {"pixel_values": {0: _BATCH, 2: "height", 3: "width"}},
        {"image_features": {0: _BATCH, 1: "num_image_tokens"}},
    )


def embedding_graph(model: FastVLMForConditionalGeneration) -> Any:
    """Return `TokenEmbedding` as an `onnx_ir.Model`: input_ids to inputs_embeds."""
    dimensions = {0: _BATCH, 1: "sequence_length"}
    return _graph(programs.export_embedding(model), {"input_ids": dimensions}, {"inputs_embeds": dimensions})


def decoder_graph(model: FastVLMForConditionalGeneration) -> Any:
    """Return `Decoder` as an `onnx_ir.Model`: one graph for prompts, whose past has length 0, and for what follows."""
    text: Any = model.config.text_config
    layers = range(text.num_hidden_layers)
    new = {0: _BATCH, 1: "sequence_length"}
    inputs = {"inputs_embeds": new, "attention_mask": {0: _BATCH, 1: "total_sequence_length"}, "position_ids": new}
    kinds = ("key", "value")
    inputs |= {f"past_key_values.{i}.{kind}": {0: _BATCH, 2: "past_sequence_length"} for i in layers for kind in kinds}
    outputs = {"logits": new}
    outputs |= {f"present.{i}.{kind}": {0: _BATCH, 2: "total_sequence_length"} for i in layers for kind in kinds}
    return _graph(programs.export_decode(model), inputs, outputs)


def _graph(program: ExportedProgram, inputs: dict[str, dict[int, str]], outputs: dict[str, dict[int, str]]) -> Any:
    """Translate a program and give its inputs, outputs and their free dimensions these names."""
    import onnx_ir as ir
    import torch

    # The exporter comments on its own work, on passes of its optimiser and on packages that it could also use.
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        translated = torch.onnx.export(program, opset_version=OPSET, dynamo=True, verbose=False)
    assert translated is not None
    model = translated.model
    graph = model.graph
    for values, wanted in ((graph.inputs, inputs), (graph.outputs, outputs)):
        if len(values) != len(wanted):
            raise RuntimeError(f"The graph has {len(values)} inputs or outputs; expected {', '.join(wanted)}.")
    # Shapes in between are left to the runtime: the exporter's names for free dimensions are not these, and where its
    # optimiser has moved an operation they need not hold any more.
    for node in graph:
        for value in node.outputs:
            value.shape = None if value not in graph.outputs else value.shape
    for values, wanted in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, (name, dimensions) in zip(values, wanted.items(), strict=True):
            value.name = name
            value.shape = ir.Shape([dimensions.get(axis, size) for axis, size in enumerate(value.shape)])
    _lay_out_weights(graph)
    return model


def _lay_out_weights(graph: Any) -> None:
    """Transpose matrices when they are saved, where the graph would do it at every start."""
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
    """Write a graph to `path`, with its weights inside or in `<path>_data`, and return whether they are outside.

    Raises:
        ValueError: the weights are to be inside but are too large.
    """
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    external = size > EXTERNAL_ABOVE if external_data is None else external_data
    if size > EXTERNAL_ABOVE and not external:
        raise ValueError(
            f"{path.name} has {size / 1e9:.1f} GB of weights, more than an ONNX file holds beside its graph. Leave "
            "external_data out, or choose a smaller precision."
        )
    ir.save(model, path, external_data=f"{path.name}_data" if external else None)
    return external
