# SPDX-License-Identifier: Apache-2.0
"""The ONNX export: its files, its graphs' inputs and outputs, and what onnxruntime computes from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the export to ONNX is an extra")
pytest.importorskip("onnxruntime", reason="the export to ONNX is an extra")
pytest.importorskip("onnxscript", reason="the export to ONNX is an extra")

from onnx_cases import (  # noqa: E402
    MAX_NEW_TOKENS,
    PRECISIONS,
    conversation,
    prepared,
    pytorch_answer,
    scenes,
    tiny_export,
    tiny_model,
)

from transformers_fastvlm import FastVLMForConditionalGeneration  # noqa: E402
from transformers_fastvlm.engines.base import Sampling  # noqa: E402
from transformers_fastvlm.engines.onnx_engine import FILE_SUFFIX, OnnxEngine, OnnxModel  # noqa: E402
from transformers_fastvlm.export import export  # noqa: E402
from transformers_fastvlm.export.reference import relative_error  # noqa: E402

PARTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
FLOAT = onnx.TensorProto.FLOAT


def signature(values: Any) -> list[tuple[str, int, list[int | str]]]:
    found = []
    for value in values:
        kind = value.type.tensor_type
        found.append((value.name, kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim]))
    return found


def test_files_and_their_names() -> None:
    files = tiny_export().files
    graphs = {f"onnx/{part}{suffix}.onnx" for part in PARTS for suffix in FILE_SUFFIX.values()}
    assert graphs <= files.keys()
    assert {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
    } <= files.keys()
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= files.keys()
    by_precision = [sum(files[f"onnx/{part}{FILE_SUFFIX[name]}.onnx"] for part in PARTS) for name in PRECISIONS]
    float32, float16, q8, q4, q4f16 = by_precision
    assert q4 < q8 < float16 < float32
    assert q4f16 < float16


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_and_outputs(precision: str) -> None:
    folder, suffix = tiny_export().directory / "onnx", FILE_SUFFIX[precision]
    text: Any = tiny_model()[0].config.text_config
    heads, size, width = text.num_key_value_heads, text.hidden_size // text.num_attention_heads, text.hidden_size
    graphs = {part: onnx.load(folder / f"{part}{suffix}.onnx").graph for part in PARTS}

    vision = graphs["vision_encoder"]
    assert signature(vision.input) == [("pixel_values", FLOAT, ["batch_size", 3, "height", "width"])]
    assert signature(vision.output) == [("image_features", FLOAT, ["batch_size", "num_image_tokens", width])]
    embed = graphs["embed_tokens"]
    assert signature(embed.input) == [("input_ids", onnx.TensorProto.INT64, ["batch_size", "sequence_length"])]
    assert signature(embed.output) == [("inputs_embeds", FLOAT, ["batch_size", "sequence_length", width])]
    decoder = graphs["decoder_model_merged"]
    names = [f"{i}.{kind}" for i in range(text.num_hidden_layers) for kind in ("key", "value")]
    past = ["batch_size", heads, "past_sequence_length", size]
    assert signature(decoder.input) == [
        ("inputs_embeds", FLOAT, ["batch_size", "sequence_length", width]),
        ("attention_mask", onnx.TensorProto.INT64, ["batch_size", "total_sequence_length"]),
        ("position_ids", onnx.TensorProto.INT64, ["batch_size", "sequence_length"]),
        *((f"past_key_values.{name}", FLOAT, past) for name in names),
        ("num_logits_to_keep", onnx.TensorProto.INT64, []),
    ]
    total = ["batch_size", heads, "total_sequence_length", size]
    assert signature(decoder.output) == [
        ("logits", FLOAT, ["batch_size", "num_logits", text.vocab_size]),
        *((f"present.{name}", FLOAT, total) for name in names),
    ]


@pytest.mark.parametrize("precision", ["q8", "q4", "q4f16"])
def test_quantized_multiplications_round_their_activations(precision: str) -> None:
    """onnxruntime's kernels without this are slower."""
    graph = onnx.load(tiny_export().directory / "onnx" / f"decoder_model_merged{FILE_SUFFIX[precision]}.onnx").graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert {next((a.i for a in node.attribute if a.name == "accuracy_level"), 0) for node in nodes} == {4}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_the_last_logits(precision: str) -> None:
    """Of a prompt and of tokens after it, in a batch too, and the head multiplies no more than these."""
    runner = OnnxModel(tiny_export().directory, precision)
    embeds = runner.embeddings(np.arange(18).reshape(2, 9))
    mask = np.ones((2, 9), dtype=np.int64)
    everything, past = runner.decode(embeds[:, :6], mask[:, :6])
    rest, _ = runner.decode(embeds[:, 6:], mask, past)
    assert everything.shape[1] == 6 and rest.shape[1] == 3
    for count in (1, 2, 20):
        first, past = runner.decode(embeds[:, :6], mask[:, :6], logits_to_keep=count)
        second, _ = runner.decode(embeds[:, 6:], mask, past, logits_to_keep=count)
        for found, logits in ((first, everything), (second, rest)):
            assert found.shape[1] == min(count, logits.shape[1])
            assert relative_error(found, torch.as_tensor(logits[:, -count:])) < 1e-5


def test_matrices_are_transposed_when_they_are_saved(tmp_path: Path) -> None:
    """Neither in the exporter's memory nor at every start."""
    import onnx_ir as ir
    import onnxruntime

    from transformers_fastvlm.export.onnx_graphs import _lay_out_weights, save_graph

    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    values = [onnx.helper.make_tensor_value_info(name, FLOAT, [2, size]) for name, size in (("x", 64), ("y", 48))]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], [onnx.numpy_helper.from_array(weight, "weight")])
    model = ir.from_proto(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    )
    _lay_out_weights(model.graph)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    save_graph(model, tmp_path / "graph.onnx", external_data=None)
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx")).run(None, {"x": x})
    assert np.allclose(y, x @ weight.T, atol=1e-5)


def test_configuration_files() -> None:
    directory = tiny_export().directory
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "llava_qwen2"
    assert config["image_token_index"] == tiny_model()[1].image_token_id
    assert config["transformers.js_config"] == {"use_external_data_format": False}
    processor = json.loads((directory / "processor_config.json").read_text())
    assert (processor["processor_class"], processor["patch_size"]) == ("LlavaProcessor", 64)
    assert "<|im_start|>" in json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    assert not (directory / "chat_template.jinja").exists()


def test_errors_against_pytorch() -> None:
    errors = tiny_export().report.errors
    assert errors["float32: image features"] < 1e-5
    assert errors["float32: logits"] < 1e-5
    assert errors["float16: logits"] < 1e-2
    assert errors["q8: logits"] < 0.05
    assert errors["q4: logits"] < 0.5
    assert errors["q4f16: logits"] < 0.5
    # Far from exact: the quantised files do hold quantised weights.
    assert errors["q8: logits"] > 1e-4
    assert errors["q4: logits"] > errors["q8: logits"]


@torch.no_grad()
def test_any_batch_length_and_resolution_and_left_padding() -> None:
    runner = OnnxModel(tiny_export().directory, "float32")
    model = tiny_model()[0]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand((3, 3, 128, 320), generator=generator)
    features = model.get_image_features(pixels).pooler_output.numpy()
    assert np.abs(runner.image_features(pixels.numpy()) - features).max() < 1e-4 * np.abs(features).max()
    ids = torch.randint(0, 200, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()
    embeds = runner.embeddings(ids.numpy())
    first, past = runner.decode(embeds[:, :5], mask[:, :5].numpy())
    rest, past = runner.decode(embeds[:, 5:], mask.numpy(), past)
    logits = np.concatenate((first, rest), axis=1)
    kept = mask.bool().numpy()
    assert np.abs(logits[kept] - expected[kept]).max() < 1e-4 * np.abs(expected[kept]).max()


@torch.no_grad()
def test_float16_is_as_exact_at_distant_positions() -> None:
    """Their frequencies rounded to float16 would be off by more with every token."""
    runner = OnnxModel(tiny_export().directory, "float16")
    ids = torch.randint(0, 200, (1, 1000), generator=torch.Generator().manual_seed(2))
    expected = tiny_model()[0](input_ids=ids).logits
    logits, _ = runner.decode(runner.embeddings(ids.numpy()), np.ones((1, 1000), dtype=np.int64))
    assert relative_error(logits[:, 900:], expected[:, 900:]) < 5e-4


def compare_tokens(count: int) -> None:
    engine = OnnxEngine(tiny_export().directory, "float32")
    for picture, question, _ in scenes(count):
        inputs = prepared(picture, question)
        tokens, text = pytorch_answer(picture, question)
        answer = engine.generate([conversation(picture, question)], Sampling(max_new_tokens=MAX_NEW_TOKENS))[0]
        assert answer.text == text
        assert answer.completion_tokens == len(tokens)
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]


def test_greedy_answers_are_pytorchs() -> None:
    compare_tokens(12)


@pytest.mark.soak
def test_greedy_answers_are_pytorchs_on_200_scenes() -> None:
    compare_tokens(200)


@pytest.mark.soak
def test_accuracy_of_the_precisions() -> None:
    rows = scenes(400)
    correct: dict[str, float] = {}
    for precision in PRECISIONS:
        engine = OnnxEngine(tiny_export().directory, precision)
        answers = engine.generate([conversation(p, q) for p, q, _ in rows], Sampling(max_new_tokens=MAX_NEW_TOKENS))
        correct[precision] = 100 * sum(a.text == row[2] for a, row in zip(answers, rows, strict=True)) / len(rows)
    print(correct)
    assert abs(correct["float16"] - correct["float32"]) <= 0.5
    assert correct["q8"] >= correct["float32"] - 0.5
    assert correct["q4"] >= correct["float32"] - 2
    assert correct["q4f16"] >= correct["float32"] - 2


@torch.no_grad()
def test_vicuna_external_data_and_a_placeholder_without_a_row(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("llama")
    done = export("onnx", source, tmp_path / "out", external_data=True)
    assert {f"onnx/{part}.onnx_data" for part in PARTS} <= done.files.keys()
    config = json.loads((done.directory / "config.json").read_text())
    external = config["transformers.js_config"]["use_external_data_format"]
    assert external == {f"{part}.onnx": True for part in PARTS}
    assert (config["model_type"], config["text_config"]["model_type"]) == ("llava", "llama")
    model = FastVLMForConditionalGeneration.from_pretrained(source).eval()
    engine = OnnxEngine(done.directory)
    picture, question, _ = scenes(1)[0]
    inputs = engine.processor.apply_chat_template(
        conversation(picture, question),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    answer = engine.generate([conversation(picture, question)], Sampling(max_new_tokens=6))[0]
    assert answer.completion_tokens == len(tokens)
    assert answer.text == engine.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
