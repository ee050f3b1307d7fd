# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs refer to the model's weights, which are converted and written one by one."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the export to ONNX is an extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="the export to ONNX is an extra")
pytest.importorskip("onnxscript", reason="the export to ONNX is an extra")

import onnx_ir as ir  # noqa: E402

from transformers_fastvlm import FastVLMForConditionalGeneration  # noqa: E402
from transformers_fastvlm.checkpoints import tiny_checkpoint  # noqa: E402
from transformers_fastvlm.export.onnx_graphs import (  # noqa: E402
    decoder_graph,
    embedding_graph,
    save_graph,
    vision_graph,
)
from transformers_fastvlm.export.onnx_quantization import quantize  # noqa: E402


def half_model() -> Any:
    return FastVLMForConditionalGeneration.from_pretrained(tiny_checkpoint(), dtype=torch.bfloat16).eval()


def test_a_file_with_its_weights_inside_is_the_same_message(tmp_path: Path) -> None:
    model = half_model()
    graph = decoder_graph(model, torch.float32)
    for name, chosen in (("plain", graph), ("quantized", quantize(graph, 4, convolutions=True))):
        assert not save_graph(chosen, tmp_path / name, external_data=None)
        saved, expected = onnx.load(tmp_path / name), ir.to_proto(chosen)
        assert len(saved.graph.initializer) > 20
        assert saved == expected


def test_weights_inside_and_outside_are_the_same(tmp_path: Path) -> None:
    model = half_model()
    graph = embedding_graph(model, torch.float16)
    assert not save_graph(graph, tmp_path / "inside.onnx", external_data=None)
    assert save_graph(graph, tmp_path / "outside.onnx", external_data=True)
    inside, outside = onnx.load(tmp_path / "inside.onnx"), onnx.load(tmp_path / "outside.onnx")
    assert (tmp_path / "outside.onnx").stat().st_size < 10_000
    (found,), (other,) = inside.graph.initializer, outside.graph.initializer
    assert np.array_equal(onnx.numpy_helper.to_array(found), onnx.numpy_helper.to_array(other))
    weight = model.get_input_embeddings().weight
    assert np.array_equal(onnx.numpy_helper.to_array(found), weight.detach().half().numpy())


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = half_model()
    before = dict(model.named_parameters(remove_duplicate=False))
    for dtype, kind in ((torch.float32, np.float32), (torch.float16, np.float16)):
        graph = decoder_graph(model, dtype)
        weights = {value.const_value.dtype.numpy() for value in graph.graph.initializers.values() if is_matrix(value)}
        assert weights == {np.dtype(kind)}
    after = dict(model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] and after[name].dtype == torch.bfloat16 for name in after)


def is_matrix(value: Any) -> bool:
    return len(value.const_value.shape) == 2 and value.const_value.size > 10_000


def test_a_graph_reads_the_weights_when_it_is_saved(tmp_path: Path) -> None:
    model = half_model()
    graph = embedding_graph(model, torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(0.5)
    save_graph(graph, tmp_path / "graph.onnx", external_data=None)
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    (embeds,) = session.run(None, {"input_ids": np.array([[3, 4]])})
    assert (embeds == 0.5).all()


@pytest.mark.parametrize("part", [vision_graph, decoder_graph])
def test_nothing_keeps_the_weights_of_a_model_that_was_deleted(part: Any) -> None:
    """The exporter leaves references to the tensors that it was given."""
    model = FastVLMForConditionalGeneration.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()
    weights = [weakref.ref(weight) for weight in model.parameters()]
    graph = part(model)
    del model
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]
    value = next(value for value in graph.graph.initializers.values() if isinstance(value.const_value, ir.LazyTensor))
    with pytest.raises(RuntimeError, match="The model was deleted"):
        value.const_value.numpy()


def test_no_matrix_is_held_in_memory_and_no_path_is_written(tmp_path: Path) -> None:
    model = half_model()
    graph = decoder_graph(model, torch.float32)
    matrices = [value.const_value for value in graph.graph.initializers.values() if is_matrix(value)]
    assert len(matrices) > 10
    assert all(isinstance(tensor, ir.LazyTensor) for tensor in matrices)
    assert not any(node.op_type == "Transpose" and node.inputs[0].is_initializer() for node in graph.graph)
    save_graph(graph, tmp_path / "graph.onnx", external_data=None)
    # The exporter notes for each operation which line of which program it is of.
    assert b'File "' not in (tmp_path / "graph.onnx").read_bytes()
