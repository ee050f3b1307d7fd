# SPDX-License-Identifier: Apache-2.0
"""FastVLMTrainer against the golden batches and against plain `Trainer`: it changes no number of a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from transformers_fastvlm.checkpoints.layouts import to_apple_name
from transformers_fastvlm.data import load
from transformers_fastvlm.training import FastVLMTrainer, Recipe, new_model, set_trainable

pytest.importorskip("accelerate", reason="Trainer needs accelerate")
from stepping import CHECKPOINTING, Gradients, train
from transformers import Trainer

Loaded = Callable[[], tuple[Any, Any]]
CHECKPOINTED = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize("conversation", ["sft", "plain"])
def test_one_step_is_plain_trainers_and_the_references(
    conversation: str, load_tiny: Loaded, golden: Path, golden_batches: dict[str, Any], tmp_path: Path
) -> None:
    case = golden_batches[conversation]
    rows = load(case["samples"], image_folder=golden / "images")
    updated = []
    for kind in (Trainer, FastVLMTrainer):
        rates = {"learning_rates": dict.fromkeys(("vision_tower", "projector", "language_model"), 1e-3)}
        check = Gradients(case["grad_norm"])
        options = rates if kind is FastVLMTrainer else {}
        trainer = train(kind, load_tiny(), rows, conversation, tmp_path, callbacks=[check], **options)
        assert check.checked == 1
        assert trainer.state.log_history[0]["loss"] == pytest.approx(case["loss"], rel=1e-4)
        updated.append(trainer.model.state_dict())
    before = load_tiny()[0].state_dict()
    moved = [name for name in before if not torch.equal(before[name], updated[0][name])]
    assert len(moved) > 100
    assert [name for name in before if not torch.equal(updated[0][name], updated[1][name])] == []


def test_parts_learn_at_their_own_rates(
    load_tiny: Loaded, golden: Path, golden_batches: dict[str, Any], tmp_path: Path
) -> None:
    """The first step of Adam is the rate times a sign, so the rates show in the weights."""
    rows = load(golden_batches["sft"]["samples"], image_folder=golden / "images")
    rates = {"vision_tower": 1e-5, "projector": 1e-3, "language_model": 1e-4}
    trainer = train(
        FastVLMTrainer, load_tiny(), rows, "sft", tmp_path, learning_rates=rates, arguments={"adam_epsilon": 1e-30}
    )
    before = load_tiny()[0].state_dict()
    after = dict(trainer.model.named_parameters())
    steps = {name: float((after[name].detach() - before[name]).abs().max()) for name in after}
    for word, rate in (("vision_tower", 1e-5), ("multi_modal_projector", 1e-3), ("language_model", 1e-4)):
        sizes = [size for name, size in steps.items() if word in name and size > 0]
        assert max(sizes) == pytest.approx(rate, rel=0.05), word
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {*rates.values()}


def test_frozen_parts_stay(load_tiny: Loaded, golden: Path, golden_batches: dict[str, Any], tmp_path: Path) -> None:
    loaded = load_tiny()
    set_trainable(loaded[0], ["projector"])
    rows = load(golden_batches["plain"]["samples"], image_folder=golden / "images")
    trainer = train(FastVLMTrainer, loaded, rows, "plain", tmp_path, learning_rates={"projector": 1e-3})
    before, after = load_tiny()[0].state_dict(), trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}
    assert all(str(to_apple_name(name)).startswith("model.mm_projector.") for name in moved)


@pytest.mark.parametrize("kind", [Trainer, FastVLMTrainer])
def test_accumulated_batches_are_the_whole_one(
    kind: type[Trainer], load_tiny: Loaded, golden: Path, golden_batches: dict[str, Any], tmp_path: Path
) -> None:
    """Rows of 16, 15 and 9 learned tokens, one of them without an image, one at a time."""
    case = golden_batches["sft"]
    rows = load(case["samples"], image_folder=golden / "images")
    check = Gradients(case["grad_norm"])
    one_by_one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    trainer = train(kind, load_tiny(), rows, "sft", tmp_path, arguments=one_by_one, callbacks=[check])
    assert check.checked == 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(case["loss"], rel=1e-4)


def test_gradient_checkpointing_gives_the_references_gradients(
    load_tiny: Loaded, golden: Path, golden_batches: dict[str, Any], tmp_path: Path
) -> None:
    case = golden_batches["sft"]
    rows = load(case["samples"], image_folder=golden / "images")
    check = Gradients(case["grad_norm"])
    trainer = train(FastVLMTrainer, load_tiny(), rows, "sft", tmp_path, arguments=CHECKPOINTED, callbacks=[check])
    assert check.checked == 1
    blocks = [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(blocks) > 5 and all(block.gradient_checkpointing for block in blocks)


def test_gradient_checkpointing_does_not_run_back_through_a_frozen_encoder(
    load_tiny: Loaded, golden: Path, golden_batches: dict[str, Any], tmp_path: Path
) -> None:
    case = golden_batches["sft"]
    model, processor = load_tiny()
    set_trainable(model, ["projector", "language_model"])
    seen = []
    model.model.vision_tower.register_forward_hook(lambda *args: seen.append(args[-1].last_hidden_state.requires_grad))
    frozen = {name: None if "vision_tower" in name else norm for name, norm in case["grad_norm"].items()}
    check = Gradients(frozen)
    rows = load(case["samples"], image_folder=golden / "images")
    train(FastVLMTrainer, (model, processor), rows, "sft", tmp_path, arguments=CHECKPOINTED, callbacks=[check])
    assert check.checked == 1 and seen == [False]


def test_gradient_checkpointing_leaves_a_train_time_encoder_the_same(
    checkpoint: Callable[[str], Path], golden: Path, golden_batches: dict[str, Any], tmp_path: Path
) -> None:
    """Its BatchNorms see each batch twice then, and its paths are dropped at random."""
    vision = {"depths": [2] * 5, "hidden_sizes": [8, 16, 32, 64, 128], "projection_dim": 0, "image_size": 128}
    rows = load(golden_batches["sft"]["samples"], image_folder=golden / "images")
    states = []
    for arguments in ({}, CHECKPOINTED):
        loaded = new_model(
            {**vision, "reparameterized": False, "drop_path_rate": 0.4}, checkpoint("qwen2_untied"), seed=4
        )
        trainer = train(FastVLMTrainer, loaded, rows, "sft", tmp_path, arguments={"max_steps": 2, **arguments})
        states.append(trainer.model.state_dict())
    assert [name for name in states[0] if not torch.allclose(states[0][name], states[1][name], atol=1e-6)] == []


def test_a_step_of_the_command_is_plain_trainers(
    load_tiny: Loaded, recipe: Callable[..., Recipe], golden: Path, golden_batches: dict[str, Any], tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from transformers_fastvlm import FastVLMForConditionalGeneration
    from transformers_fastvlm.cli import app

    rows = load(golden_batches["sft"]["samples"], image_folder=golden / "images")
    trainer = train(Trainer, load_tiny(), rows, "sft", tmp_path / "plain")
    made = recipe(
        data={"options": {"limit": 3}},  # the golden batch
        train={"global_batch_size": 3},
        arguments={
            "per_device_train_batch_size": 3,
            "max_steps": 1,
            "save_strategy": "no",
            "max_grad_norm": 0,
            "seed": 1,
        },
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(made.to_yaml())
    done = CliRunner().invoke(app, ["train", str(file)], prog_name="fastvlm")
    assert done.exit_code == 0, done.stderr
    model = FastVLMForConditionalGeneration.from_pretrained(done.stdout.strip())
    ours, theirs = model.state_dict(), trainer.model.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert not torch.equal(ours["lm_head.weight"], load_tiny()[0].state_dict()["lm_head.weight"])
