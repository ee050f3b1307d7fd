# SPDX-License-Identifier: Apache-2.0
"""Configurations: Apple's flat form, our nested form, presets, and errors for contradictory fields."""

import json
import math
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from transformers_fastvlm import FastViTHDConfig, FastVLMConfig
from transformers_fastvlm.configuration_fastvlm import nested_from_flat, vision_features

# The published config.json of the 0.5B model, key for key.
APPLE_0_5B = {
    "_name_or_path": "./llava-v1.5-13b",
    "architectures": ["LlavaQwen2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "llava_qwen.LlavaConfig",
        "AutoModelForCausalLM": "llava_qwen.LlavaQwen2ForCausalLM",
    },
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 896,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "mm_hidden_size": 3072,
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "mobileclip_l_1024",
    "model_type": "llava_qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "tokenizer_model_max_length": 8192,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": True,
    "use_cache": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_apples_config_is_read_whole() -> None:
    config = FastVLMConfig.from_dict(dict(APPLE_0_5B))
    assert type(config) is FastVLMConfig
    assert config.architectures == ["FastVLMForConditionalGeneration"]
    assert config.vision_config.to_dict() == FastViTHDConfig().to_dict()
    assert config.text_config.model_type == "qwen2"
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(config.text_config, name) == APPLE_0_5B[name]
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    assert config.text_config.use_sliding_window is False
    assert config.tie_word_embeddings is True
    assert str(config.dtype) == "torch.bfloat16"
    assert config.image_token_id is None  # a dictionary has no tokenizer beside it
    left = {"auto_map", "mm_projector_type", "mm_hidden_size", "use_mm_proj"}
    assert not left & config.to_dict().keys()
    assert not left & config.text_config.to_dict().keys()


def test_preset_equals_apples_config() -> None:
    ours = FastVLMConfig.from_preset("0.5B").text_config.to_dict()
    apples = FastVLMConfig.from_dict(dict(APPLE_0_5B)).text_config.to_dict()
    assert {k: v for k, v in ours.items() if apples[k] != v} == {"pad_token_id": 151643}


@pytest.mark.parametrize(
    ("name", "text", "tied", "parameters"),
    [
        ("0.5b", "qwen2", True, 494_032_768),
        ("1.5b", "qwen2", True, 1_543_714_304),
        ("7b", "qwen2", False, 7_615_616_512),
        ("vicuna-7b", "llama", False, 6_738_415_616),
    ],
)
def test_presets_build_the_published_language_models(
    name: str, text: str, tied: bool, parameters: int, golden: Path
) -> None:
    torch = pytest.importorskip("torch")
    from transformers_fastvlm import FastVLMForConditionalGeneration

    config = FastVLMConfig.from_preset(name)
    assert config.text_config.model_type == text
    assert config.tie_word_embeddings is tied
    with torch.device("meta"):
        model = FastVLMForConditionalGeneration(config)
    hidden = config.text_config.hidden_size
    projector = 3072 * hidden + hidden + hidden * hidden + hidden
    own = sum(p.numel() for p in model.parameters())
    encoder = sum(p.numel() for p in model.model.vision_tower.parameters())
    assert own - projector - encoder == parameters  # the language model's published size
    index = json.loads((golden / "vision_full_weights.json").read_text())
    published = sum(
        math.prod(spec["shape"])
        for name, spec in index.items()
        if ".bn." not in name or ("running" not in name and "num_b" not in name)
    )
    assert encoder == published


def test_unknown_preset_lists_the_sizes() -> None:
    with pytest.raises(ValueError, match=r"0.5b, 1.5b, 7b, vicuna-7b"):
        FastVLMConfig.from_preset("3b")


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied", "llama", "qwen2_anyres"])
def test_round_trip_through_our_form(name: str, checkpoint, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint(name))
    assert type(config) is FastVLMConfig
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is FastVLMConfig
    ours, theirs = config.to_dict(), again.to_dict()
    for d in (ours, theirs):
        d.pop("_name_or_path", None)
    assert ours == theirs
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fastvlm"
    assert again.image_token_id == 483


def test_class_and_auto_class_agree(checkpoint) -> None:
    directory = checkpoint("qwen2_anyres")
    assert (
        FastVLMConfig.from_pretrained(directory).to_diff_dict() == AutoConfig.from_pretrained(directory).to_diff_dict()
    )


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_remote_code_in_auto_map_is_never_wanted(trust_remote_code: bool | None, checkpoint) -> None:
    config = AutoConfig.from_pretrained(checkpoint("qwen2_tied"), trust_remote_code=trust_remote_code)
    assert type(config) is FastVLMConfig
    assert not hasattr(config, "auto_map")


def test_encoder_config_out_of_a_whole_checkpoint(checkpoint, tmp_path: Path) -> None:
    flat = FastViTHDConfig.from_pretrained(checkpoint("llama"))
    FastVLMConfig.from_pretrained(checkpoint("llama")).save_pretrained(tmp_path)
    nested = FastViTHDConfig.from_pretrained(tmp_path)
    for config in (flat, nested):
        assert (config.image_size, list(config.hidden_sizes)) == (256, [8, 16, 32, 64, 128])
        assert config.num_features == 256


def _written(tmp_path: Path, source: Path, **changes: object) -> Path:
    target = tmp_path / "changed"
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_vision_tower": "openai/clip-vit-large-patch14"}, "clip-vit-large-patch14.*mobileclip_l_1024"),
        ({"mm_vision_tower": None}, "mm_vision_tower None"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear', expected 'mlp2x_gelu'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
        ({"mm_hidden_size": 3072}, "mm_hidden_size is 3072.*256 output channels"),
        ({"mm_vision_tower": "mobileclip_l_512", "vision_config": {"image_size": 256}}, "says 512 pixels.*256"),
        ({"mm_vision_tower": "mobileclip_l_100"}, "image_size is 100.*multiple of 64"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints is None"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[300, 256]]}, r"\[300, 256\].*not a multiple"),
    ],
)
def test_contradictions_are_errors(changes: dict, message: str, checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(_written(tmp_path, checkpoint("qwen2_tied"), **changes))


@pytest.mark.parametrize("ratio", ["stretch", "anyres_max_9"])
def test_unknown_aspect_ratio(ratio: str) -> None:
    with pytest.raises(Exception, match=ratio):
        FastVLMConfig(image_aspect_ratio=ratio)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"depths": [1, 2]}, "depths is"),
        ({"hidden_sizes": [8, 16, 32, 60, 128]}, "multiples of attention_head_dim"),
        ({"hidden_sizes": [64, 96, 192, 384, 768]}, "multiple of the one before"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"image_size": 1000}, "image_size is 1000"),
        ({"multi_scale": "sum"}, "multi_scale"),
    ],
)
def test_encoder_fields_are_checked(field: dict, message: str) -> None:
    with pytest.raises(Exception, match=message):
        FastViTHDConfig(**field)


def test_any_text_model(tmp_path: Path) -> None:
    for model_type in ("qwen2", "qwen3", "llama", "mistral"):
        config = FastVLMConfig(text_config={"model_type": model_type, "hidden_size": 64})
        assert config.text_config.model_type == model_type
        config.save_pretrained(tmp_path / model_type)
        assert AutoConfig.from_pretrained(tmp_path / model_type).text_config.model_type == model_type
    with pytest.raises(ValueError, match="no_such_model"):
        FastVLMConfig(text_config={"model_type": "no_such_model"})


def test_output_channels() -> None:
    assert vision_features(None) == 3072
    assert vision_features([8, 16, 32, 64, 128], "pool") == 256 + 8 + 16 + 32 + 64


def test_missing_aspect_ratio_is_llavas_default() -> None:
    flat = {k: v for k, v in APPLE_0_5B.items() if k != "image_aspect_ratio"}
    assert nested_from_flat(flat)["image_aspect_ratio"] == "square"
