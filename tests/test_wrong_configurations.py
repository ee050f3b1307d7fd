# SPDX-License-Identifier: Apache-2.0
"""Invalid settings: each gives one ValueError that names folder, file, field, value and the expected value."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from transformers_fastvlm import FastViTHDConfig, FastViTHDModel, FastVLMConfig, FastVLMForConditionalGeneration
from transformers_fastvlm.engines.model_loading import load_model

POSITIVE = "expected a number above 0"
ACTIVATION = "expected an activation"
# (field of Apple's flat config.json, value, what was expected)
FLAT: list[tuple[str, Any, str]] = [
    ("hidden_size", 0, POSITIVE),
    ("hidden_size", 130, "expected a multiple of num_attention_heads, 4"),
    ("num_attention_heads", 0, POSITIVE),
    ("num_attention_heads", "4", POSITIVE),
    ("num_key_value_heads", 3, "expected a divisor of num_attention_heads, 4"),
    ("vocab_size", -5, POSITIVE),
    ("max_position_embeddings", -1, POSITIVE),
    ("intermediate_size", 1.5, "expected int"),
    ("max_window_layers", "x", "expected int"),
    ("rms_norm_eps", "x", POSITIVE),
    ("rope_theta", "x", POSITIVE),
    ("rope_theta", 0, POSITIVE),
    ("rope_scaling", 5, "expected an object with a rope_type"),
    ("rope_scaling", {"rope_type": "nope", "factor": 2.0}, "expected an object with a rope_type"),
    ("hidden_act", "nope", ACTIVATION),
    ("layer_types", 5, "expected a list"),
    ("eos_token_id", "x", "expected int or a list or null"),
    ("image_token_id", "x", "expected an id"),
    ("image_token_id", -3, "expected an id"),
    ("image_aspect_ratio", 5, "expected one of"),
    ("image_grid_pinpoints", 5, "expected a list"),
    ("mm_patch_merge_type", "x", "expected one of"),
    ("vision_config", 5, "expected an object"),
    ("torch_dtype", "float99", "expected a torch dtype"),
    ("torch_dtype", 5, "expected a torch dtype"),
    ("quantization_config", 5, "expected an object with a quant_method"),
    ("quantization_config", {"quant_method": "nonsense"}, "expected an object with a quant_method"),
    ("tie_word_embeddings", "no", "expected true or false"),
]
# Fields for which the Auto classes fail before they reach this package.
FLAT_OF_TOOLS = [
    ("architectures", 5, "expected a list"),
    ("auto_map", 5, "expected an object"),
    ("model_type", 5, "expected a name"),
    ("model_type", ["llava_qwen2"], "expected a name"),
]
NESTED: list[tuple[str, Any, str]] = [
    ("text_config", 5, "expected an object"),
    ("vision_config", [], "expected an object"),
    ("vision_config.depths", 5, "expected a list"),
    ("vision_config.hidden_sizes", [8, 16, "x", 64, 128], "expected a"),
    ("vision_config.hidden_act", "nope", ACTIVATION),
    ("vision_config.mlp_ratio", 0, POSITIVE),
    ("vision_config.attention_head_dim", 0, POSITIVE),
    ("vision_config.num_channels", 0, POSITIVE),
    ("vision_config.image_size", -64, POSITIVE),
    ("vision_config.projection_dim", -1, "expected a number of channels"),
    ("text_config.hidden_act", "nope", ACTIVATION),
    ("projector_hidden_act", "nope", ACTIVATION),
    ("dtype", "float99", "expected a torch dtype"),
]
DEEP = 100_000
# (file, content, what the error says)
FILES: list[tuple[str, str, str]] = [
    ("config.json", "[]", "expected an object"),
    ("config.json", "null", "expected an object"),
    ("config.json", "5", "expected an object"),
    ("config.json", '"x"', "expected an object"),
    ("config.json", "[" * DEEP + "]" * DEEP, "not valid JSON"),
    ("config.json", '{"a":' * DEEP + "1" + "}" * DEEP, "not valid JSON"),
    ("generation_config.json", "[]", "expected an object"),
    ("generation_config.json", "{", "not valid JSON"),
    ("generation_config.json", '{"temperature": "x"}', "temperature is 'x'; expected a number"),
    ("generation_config.json", '{"temperature": -1.0}', "temperature is -1.0; expected a number"),
    ("generation_config.json", '{"top_p": 5.0}', "top_p is 5.0; expected a number from 0 to 1"),
    ("generation_config.json", '{"num_beams": "x"}', "num_beams is 'x'; expected a number"),
    ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'; expected an id"),
    ("generation_config.json", '{"max_new_tokens": -1}', "max_new_tokens is -1; expected a number"),
    ("model.safetensors.index.json", "[]", "expected an object"),
    ("model.safetensors.index.json", "{}", "has no weight_map"),
    ("model.safetensors.index.json", '{"weight_map": []}', "has no weight_map"),
    ("model.safetensors.index.json", '{"weight_map": {"a": 5}}', "has no weight_map"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}', "same directory"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "/abs/x.safetensors"}}', "same directory"),
]


@pytest.fixture
def folder(checkpoint, tmp_path: Path) -> Path:
    """A copy of a checkpoint in Apple's layout."""
    target = tmp_path / "model"
    shutil.copytree(checkpoint("qwen2_untied"), target)
    return target


@pytest.fixture(scope="module")
def nested_config(checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = AutoConfig.from_pretrained(checkpoint("qwen2_untied")).to_dict()
    return json.loads(json.dumps(found, default=str))


def change(folder: Path, field: str, value: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    part, _, inner = field.rpartition(".")
    (config[part] if part else config)[inner] = value
    path.write_text(json.dumps(config))


def check(error: Any, folder: Path, field: str, value: Any, expected: str) -> None:
    message = str(error.value)
    for words in (f"{folder}/config.json: ", field.rpartition(".")[2], repr(value)[:40], expected):
        assert words in message, message
    assert len(message) < 600 and message.count("\n") < 3


@pytest.mark.parametrize(("field", "value", "expected"), FLAT)
def test_field_of_the_flat_form(field: str, value: Any, expected: str, folder: Path) -> None:
    change(folder, field, value)
    for load in (
        AutoModelForImageTextToText.from_pretrained,
        AutoConfig.from_pretrained,
        FastVLMConfig.from_pretrained,
    ):
        with pytest.raises(ValueError, match="expected") as error:
            load(folder)
        check(error, folder, field, value, expected)


@pytest.mark.parametrize(("field", "value", "expected"), FLAT_OF_TOOLS)
def test_field_that_the_auto_classes_trip_over(field: str, value: Any, expected: str, folder: Path) -> None:
    change(folder, field, value)
    with pytest.raises(ValueError, match="expected") as error:
        load_model(str(folder), torch.device("cpu"))
    check(error, folder, field, value, expected)


@pytest.mark.parametrize(("field", "value", "expected"), NESTED)
def test_field_of_the_nested_form(
    field: str, value: Any, expected: str, folder: Path, nested_config: dict[str, Any]
) -> None:
    (folder / "config.json").write_text(json.dumps(nested_config))
    change(folder, field, value)
    with pytest.raises(ValueError, match="expected") as error:
        AutoModelForImageTextToText.from_pretrained(folder)
    check(error, folder, field, value, expected)


@pytest.mark.parametrize(("name", "content", "expected"), FILES, ids=range(len(FILES)))
def test_file(name: str, content: str, expected: str, folder: Path) -> None:
    (folder / name).write_text(content)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    loads: list[Any] = [lambda: load_model(str(folder), torch.device("cpu"))]
    if name != "config.json":
        loads.append(lambda: AutoModelForImageTextToText.from_pretrained(folder))
    else:
        loads.append(lambda: FastVLMConfig.from_pretrained(folder))
        loads.append(lambda: FastVLMForConditionalGeneration.from_pretrained(folder))
    for load in loads:
        with pytest.raises(ValueError, match=expected) as error:
            load()
        assert f"{folder}/{name}" in str(error.value)


def test_another_model(folder: Path) -> None:
    """Neither class accepts a Llama as a FastVLM."""
    for kind, advice in {"llama": "another model", "fast_vlm": "fastvlm convert"}.items():
        change(folder, "model_type", kind)
        for cls in (FastVLMConfig, FastViTHDConfig, FastViTHDModel, FastVLMForConditionalGeneration):
            with pytest.raises(ValueError, match=f"model_type is '{kind}'; expected.*{advice}"):
                cls.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"model_type is 'llama'; expected.*another model"):
        FastViTHDModel.from_pretrained(folder, config=AutoConfig.for_model("llama"))


def test_beams_of_a_checkpoint_do_not_reach_the_tools(folder: Path) -> None:
    (folder / "generation_config.json").write_text(
        '{"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": true, "output_scores": true}'
    )
    from transformers_fastvlm.engines import Sampling, load_engine

    engine: Any = load_engine("transformers", str(folder), dtype="float32", device="cpu")
    (answer,) = engine.generate([[{"role": "user", "content": "Hi"}]], Sampling(max_new_tokens=3))
    assert isinstance(answer.text, str)
    plain = AutoModelForImageTextToText.from_pretrained(folder)  # generate() uses the values of the file
    assert plain.generation_config.num_beams == 3
