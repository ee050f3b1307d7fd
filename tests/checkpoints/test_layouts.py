# SPDX-License-Identifier: Apache-2.0
"""The table of Apple's and our names, and the renamings that Transformers applies from it."""

import json
from pathlib import Path

import pytest

from transformers_fastvlm.checkpoints.layouts import (
    APPLE_TO_OURS,
    apple_weight_renamings,
    encoder_weight_renamings,
    is_dropped,
    to_apple_name,
    to_our_name,
)

MODELS = ("qwen2_tied", "qwen2_untied", "llama", "qwen2_anyres")


def apply(renamings: list, name: str) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def apple_names(golden: Path) -> list[str]:
    files = [golden / model / "weights.json" for model in MODELS] + [golden / "train_form_weights.json"]
    return sorted({name for file in files for name in json.loads(file.read_text())})


def test_no_prefix_hides_another():
    for side in zip(*APPLE_TO_OURS, strict=True):
        assert len(set(side)) == len(side)
        assert not [(a, b) for a in side for b in side if a != b and a.startswith(b)]


def test_names_go_there_and_back_and_twice_changes_nothing(golden: Path):
    for name in apple_names(golden):
        ours = to_our_name(name)
        assert to_our_name(ours) == ours
        assert to_apple_name(ours) == name == to_apple_name(name)


def test_transformers_renames_by_the_same_table(golden: Path):
    forward = apple_weight_renamings()
    backward = [renaming.reverse_transform() for renaming in forward[::-1]]
    for name in apple_names(golden):
        ours = apply(forward, name)
        assert ours == to_our_name(name)
        assert apply(forward, ours) == ours
        assert apply(backward, ours) == name


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "language_model.layers.0.mlp.up_proj.weight",
        "vision_tower.patch_embed.0.reparam_conv.weight",
        "model.layersnorm.weight",
        "xmodel.norm.weight",
    ],
)
def test_other_names_pass_unchanged_and_are_unknown(name: str):
    assert apply(apple_weight_renamings(), name) == name
    assert to_our_name(name) is None
    assert to_apple_name(name) is None


@pytest.mark.parametrize(
    "prefix", ["model.vision_tower.vision_tower.model.", "model.vision_tower.", "vision_tower.", ""]
)
def test_encoder_is_found_in_any_checkpoint(prefix: str):
    assert apply(encoder_weight_renamings(), f"{prefix}network.0.0.layer_scale") == "network.0.0.layer_scale"


def test_encoder_leaves_the_rest_alone():
    assert apply(encoder_weight_renamings(), "model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"


def test_rotary_frequencies_are_dropped():
    assert is_dropped("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not is_dropped("model.layers.3.self_attn.q_proj.weight")
