# SPDX-License-Identifier: Apache-2.0
"""Parts of a model: what learns, how fast, and what weight decay leaves out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from transformers_fastvlm import FastVLMConfig, FastVLMForConditionalGeneration
from transformers_fastvlm.training import PARTS, describe_parts, parameter_groups, set_trainable
from transformers_fastvlm.training.parts import decays, part_of


def tiny(text: str = "qwen3", **vision: Any) -> FastVLMForConditionalGeneration:
    """A model of every kind of layer that FastVLM has."""
    config = FastVLMConfig(
        vision_config={"depths": [1] * 5, "hidden_sizes": [8, 16, 32, 64, 128], "projection_dim": 16, **vision},
        text_config={
            "model_type": text,
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[1024, 2048]],
        mm_patch_merge_type="spatial_unpad",
    )
    return FastVLMForConditionalGeneration(config)


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("reparameterized", [True, False])
def test_decay_leaves_out_norms_biases_and_scales(text: str, reparameterized: bool) -> None:
    model = tiny(text, reparameterized=reparameterized)
    norms = {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
        for parameter, _ in module.named_parameters(recurse=False)
    }
    assert len(norms) > 10
    for name, parameter in model.named_parameters():
        vector = parameter.ndim in (1, 3)  # biases and the newline; layer scales, which are (C, 1, 1)
        assert decays(name) == (name not in norms and not vector), name


@pytest.mark.parametrize("prefix", ["", "module.", "base_model.model.", "_fsdp_wrapped_module.", "_orig_mod."])
def test_parts_go_by_names_under_any_wrapper(prefix: str) -> None:
    names = {
        "model.vision_tower.network.0.0.layer_scale": "vision_tower",
        "model.multi_modal_projector.linear_1.weight": "projector",
        "model.image_newline": "projector",
        "model.language_model.layers.0.self_attn.q_proj.weight": "language_model",
        "lm_head.weight": "language_model",
    }
    assert {name: part_of(prefix + name) for name in names} == names


def test_a_parameter_of_no_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'classifier\.weight' belongs to none of vision_tower, projector"):
        part_of("classifier.weight")


@pytest.mark.parametrize("parts", [["projector"], ["vision_tower", "language_model"], list(PARTS), []])
def test_only_the_parts_named_learn_and_never_the_clip_head(parts: list[str]) -> None:
    model = tiny()
    set_trainable(model, parts)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name for name, _ in model.named_parameters() if part_of(name) in parts}
    assert learns == {name for name in expected if "head.proj" not in name}
    for part, (total, trainable) in describe_parts(model).items():
        head = model.model.vision_tower.head.proj.numel() if part == "vision_tower" else 0
        assert trainable == (total - head if part in parts else 0)


def test_groups_cover_what_learns_once(load_tiny: Callable[[], Any]) -> None:
    model, _ = load_tiny()
    set_trainable(model, ["vision_tower", "projector"])
    groups = parameter_groups(model, {"vision_tower": 2e-6, "projector": 1e-3}, weight_decay=0.1)
    assert [(group["part"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("vision_tower", 2e-6, 0.1),
        ("vision_tower", 2e-6, 0.0),
        ("projector", 1e-3, 0.1),
        ("projector", 1e-3, 0.0),
    ]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    torch.optim.AdamW(groups, lr=1.0)  # takes them as they are


def test_a_part_that_learns_needs_a_rate(load_tiny: Callable[[], Any]) -> None:
    model, _ = load_tiny()
    with pytest.raises(ValueError, match="vision_tower is trainable, but has no learning rate"):
        parameter_groups(model, {"projector": 1e-3})


@pytest.mark.parametrize("call", [set_trainable, lambda model, parts: parameter_groups(model, {parts[0]: 1.0})])
def test_unknown_parts_are_refused(load_tiny: Callable[[], Any], call: Any) -> None:
    with pytest.raises(ValueError, match="There is no part 'encoder'; expected some of vision_tower, projector"):
        call(load_tiny()[0], ["encoder"])
