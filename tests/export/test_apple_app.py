# SPDX-License-Identifier: Apache-2.0
"""The target apple-app: the names, shapes and settings that the app's code reads."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.export import export

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages and what they import
mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("coremltools", reason="coremltools is not installed")


def test_folder_of_the_app(tmp_path: Path) -> None:
    done = export("apple-app", tiny_checkpoint(), tmp_path / "out", precision="q8")
    assert done.report.checked_in is None
    assert all(error < 1e-2 for error in done.report.errors.values())
    folder = done.directory
    assert (folder / "fastvithd.mlpackage" / "Manifest.json").is_file()

    arrays = mx.load(str(folder / "model.safetensors"))
    assert {name.split(".")[0] for name in arrays} == {"language_model", "multi_modal_projector"}
    assert arrays["multi_modal_projector.linear_0.weight"].shape == (192, 512)
    assert arrays["language_model.model.embed_tokens.scales"].shape == (512, 3)
    assert not any("lm_head" in name for name in arrays), "tied"

    config = json.loads((folder / "config.json").read_text())
    needed = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    assert all(isinstance(config[name], int) for name in (*needed, "vocab_size", "mm_hidden_size"))
    assert config["model_type"] == "llava_qwen2"
    assert config["quantization"] == {"group_size": 64, "bits": 8}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert config["image_token_index"] == tokenizer.convert_tokens_to_ids("<image>") < config["vocab_size"]

    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessor["processor_class"] == "LlavaProcessor"
    assert (preprocessor["size"], preprocessor["crop_size"]["width"]) == ({"shortest_edge": 256}, 256)
    assert "stops at any other" in (folder / "README.md").read_text()


def test_only_qwen2(checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a 'llama'; Apple's app runs Qwen2 alone"):
        export("apple-app", checkpoint("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
