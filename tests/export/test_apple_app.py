# SPDX-License-Identifier: Apache-2.0
"""The target apple-app: the names, shapes and settings that the app's code reads, and what its two halves compute."""

import json
from pathlib import Path

import pytest
from export_scenes import scene_cases
from transformers import AutoTokenizer

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.export import Export, export

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages and what they import
mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("coremltools", reason="coremltools is not installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export("apple-app", tiny_checkpoint(), tmp_path_factory.mktemp("app") / "out", precision="q8")


def test_folder_of_the_app(exported: Export) -> None:
    assert exported.report.checked_in is None
    assert all(error < 1e-2 for error in exported.report.errors.values())
    folder = exported.directory
    assert (folder / "fastvithd.mlpackage" / "Manifest.json").is_file()

    arrays = mx.load(str(folder / "model.safetensors"))
    assert {name.split(".")[0] for name in arrays} == {"language_model", "multi_modal_projector"}
    assert arrays["multi_modal_projector.linear_0.weight"].shape == (192, 512)
    assert arrays["language_model.model.embed_tokens.scales"].shape == (512, 3)
    assert not any("lm_head" in name for name in arrays), "tied"

    config = json.loads((folder / "config.json").read_text())
    needed = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    assert all(isinstance(config[name], int) for name in (*needed, "vocab_size", "mm_hidden_size"))
    assert isinstance(config["rms_norm_eps"], float) and isinstance(config["tie_word_embeddings"], bool)
    assert "rope_scaling" not in config, "the app would look for mrope_section in it"
    assert config["model_type"] == "llava_qwen2"
    assert config["quantization"] == {"group_size": 64, "bits": 8}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert config["image_token_index"] == tokenizer.convert_tokens_to_ids("<image>") < config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"], "the app ends answers at the tokenizer's"

    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessor["processor_class"] == "LlavaProcessor"
    assert (preprocessor["size"], preprocessor["crop_size"]["width"]) == ({"shortest_edge": 256}, 256)
    assert (preprocessor["image_mean"], preprocessor["image_std"]) == ([0, 0, 0], [1, 1, 1])
    assert "requires features of shape" in (folder / "README.md").read_text()


def test_its_halves_answer_together(exported: Export) -> None:
    """Encoder, projector and language model, from the files and put together as the app does, answer a question."""
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    from mlx import nn
    from mlx_vlm.models.fastvlm.config import TextConfig
    from mlx_vlm.models.fastvlm.language import LanguageModel

    from transformers_fastvlm.export.coreml_check import evaluate

    folder = exported.directory
    config = json.loads((folder / "config.json").read_text())
    arrays = mx.load(str(folder / "model.safetensors"))
    model = LanguageModel(TextConfig.from_dict(config))
    weights = {
        name.removeprefix("language_model."): array
        for name, array in arrays.items()
        if name.startswith("language_model.")
    }
    nn.quantize(model, **config["quantization"], class_predicate=lambda path, module: f"{path}.scales" in weights)
    model.load_weights(list(weights.items()))  # all of them, and no others

    def linear(index: int, values):
        name = f"multi_modal_projector.linear_{index}"
        return values @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    (case,) = scene_cases(1)
    encoded = mx.array(evaluate(folder / "fastvithd.mlpackage", case.pixel_values).numpy())
    features = linear(2, nn.gelu(linear(0, encoded)))
    embeds = model.model.embed_tokens(mx.array([case.input_ids])).astype(mx.float32)
    places = [place for place, token in enumerate(case.input_ids) if token == config["image_token_index"]]
    assert len(places) == features.shape[1] == 16
    embeds[:, mx.array(places)] = features
    expected = [*case.tokens, config["eos_token_id"]]
    found: list[int] = []
    while len(found) < len(expected):
        found.append(int(model(None, inputs_embeds=embeds).logits[0, -1].argmax()))
        embeds = mx.concatenate([embeds, model.model.embed_tokens(mx.array([found[-1:]])).astype(mx.float32)], axis=1)
    assert found == expected


def test_only_qwen2(checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a 'llama'; Apple's app supports only Qwen2"):
        export("apple-app", checkpoint("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
