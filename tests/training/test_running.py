# SPDX-License-Identifier: Apache-2.0
"""Whole runs: what is left behind, what is refused, dry runs, and the stages one after the other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers import golden_images
from transformers_fastvlm.training import Recipe, load_recipe, new_model, run, save_model

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

MakeRecipe = Callable[..., Recipe]
SMALL = {"image_size": 64}
NO_CHECKPOINTS = {"max_steps": 1, "save_strategy": "no"}
TRAIN_TIME = {
    "depths": [1] * 5,
    "hidden_sizes": [8, 16, 32, 64, 128],
    "projection_dim": 0,
    "image_size": 128,
    "reparameterized": False,
}


def statistics(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.endswith("running_mean")}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Return the first words of the names of tensors that differ."""
    assert before.keys() == after.keys()
    return {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}


def test_the_result_is_a_model_like_any_other(
    recipe: MakeRecipe, rows_file: Path, golden: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    told: list[str] = []
    made = recipe(
        model=SMALL,
        data={"eval_source": str(rows_file)},
        train={"sample_answers": 1},
        arguments={"eval_steps": 2},
    )
    out = run(made, report=told.append)
    assert out == tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {"checkpoint-2", "checkpoint-4", "samples.jsonl", "recipe.yaml"}
    assert load_recipe(out / "recipe.yaml") == made

    model: Any = AutoModelForImageTextToText.from_pretrained(out)
    processor = AutoProcessor.from_pretrained(out)
    assert model.config.vision_config.image_size == 64
    inputs = processor(text="<image>\nWhat?", images=golden_images(golden, ["wide_rgb.png"]), return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (64, 64)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).equal(answer)
    before = AutoModelForImageTextToText.from_pretrained(checkpoint("qwen2_tied")).state_dict()
    assert moved(before, model.state_dict()) == {"vision_tower", "multi_modal_projector", "language_model", "weight"}

    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    logged = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(logged) == 4 and logged[-1] < logged[0]
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [2, 4]
    assert [line for line in told if line.startswith("step 4/4: loss ")] and f"finished: {out}" in told


def test_a_run_in_the_way_is_refused_and_a_finished_one_stays(recipe: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = recipe(model=SMALL, arguments={"max_steps": 2})
    run(first)
    with pytest.raises(FileExistsError, match=r"already holds checkpoint-2, which is not overwritten. Resume it"):
        run(first)
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    told: list[str] = []
    run(first, resume=True, report=told.append)
    assert told == [f"{out} is already finished."]
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp

    longer = recipe(model=SMALL, arguments={"max_steps": 3})
    run(longer, resume=True, report=told.append)
    assert "changed since the run started: arguments.max_steps was 2, is 3" in told
    assert f"resuming from {out / 'checkpoint-2'}" in told
    assert json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file is a file; expected a directory"):
        run(recipe(output_dir=str(tmp_path / "file")))


def test_a_dry_run_tells_all_and_writes_nothing(recipe: MakeRecipe, rows_file: Path, tmp_path: Path) -> None:
    told: list[str] = []
    made = recipe(
        description="a test",
        model=SMALL,
        data={"eval_source": str(rows_file), "eval_options": {"limit": 5}},
        train={
            "parts": ["projector", "language_model"],
            "learning_rate": {"projector": 1e-3, "language_model": 2e-5},
            "global_batch_size": 4,
            "gradient_checkpointing": True,
        },
        arguments={"max_steps": -1, "num_train_epochs": 2},
    )
    run(made, dry_run=True, report=told.append)
    assert not (tmp_path / "out").exists()
    text = "\n".join(told)
    model = AutoModelForImageTextToText.from_pretrained(made.model.path)
    projector = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    assert told[0] == "test: a test"
    assert "64x64 pixels, encoder in merged form, BatchNorm statistics frozen" in text
    assert any(line.startswith("  vision_tower") and line.endswith("parameters, frozen") for line in told)
    assert any(line.endswith(f"{projector:,} parameters, {projector:,} trained, learning rate 0.001") for line in told)
    assert any(line.startswith("  language_model") and line.endswith("trained, learning rate 2e-05") for line in told)
    assert "data     12 rows, conversation sft; evaluated on 5 rows" in told
    assert "update   4 rows = 2 x 1 devices x 2 accumulated; 6 updates" in told
    assert "compute  weights float32, gradient checkpointing, on cpu" in told
    assert any(line.startswith("memory   about ") and "for 2 rows of " in line for line in told)
    assert f"output   {tmp_path / 'out'}" in told


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"output_dir": None}, ValueError, "output_dir is not set"),
        ({"model": {"path": None}}, ValueError, "model.path is not set: name the directory"),
        ({"data": {"source": None}}, ValueError, "data.source is not set: name a LLaVA file"),
        ({"data": {"source": "gone.json"}}, FileNotFoundError, "the file 'gone.json' does not exist"),
        ({"data": {"options": {"limt": 3}}}, ValueError, "options of .* are invalid .*limt"),
        ({"data": {"source": "scenes", "options": {"sed": 3}}}, ValueError, "options of scenes are invalid .*sed"),
        ({"model": {"path": None, "new": {"encoder": "x"}}}, ValueError, "model.new does not fit new_model .*encoder"),
        ({"model": {"dtype": "int8"}}, ValueError, "dtype is 'int8'; expected a floating-point dtype"),
        ({"train": {"global_batch_size": 3}}, ValueError, "global_batch_size is 3, but 1 device of 2 rows each"),
        ({"data": {"max_length": 10_000}}, ValueError, "max_length is 10000, but the model's context holds"),
    ],
)
def test_what_cannot_be_run_is_named_and_leaves_nothing(
    sections: dict[str, Any], error: type[Exception], message: str, recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(recipe(**sections))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_bad_row_is_named_when_it_is_read(recipe: MakeRecipe, golden: Path, tmp_path: Path) -> None:
    """By a worker of the data loader too, whose traceback is not repeated."""
    rows = [
        {
            "id": "r",
            "image": "gone.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}],
        }
    ]
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(rows * 4))
    for workers in (0, 1):
        made = recipe(
            output_dir=str(tmp_path / f"out-{workers}"),
            model=SMALL,
            data={"source": str(file)},
            arguments={**NO_CHECKPOINTS, "dataloader_num_workers": workers},
        )
        with pytest.raises(ValueError, match=r"^\S*bad.json, row \d \(id 'r'\): the image 'gone.png' does not exist"):
            run(made)


def test_stages_follow_each_other(
    recipe: MakeRecipe, golden: Path, checkpoint: Callable[[str], Path], golden_batches: dict[str, Any], tmp_path: Path
) -> None:
    """A train-time encoder: stage 1 leaves it as it is, stage 2 trains it, and the last one merges it."""
    new = save_model(*new_model(TRAIN_TIME, checkpoint("qwen2_tied")), tmp_path / "new")
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps(golden_batches["plain"]["samples"]))
    stage1 = run(
        recipe(
            output_dir=str(tmp_path / "stage1"),
            model={"path": str(new)},
            data={"source": str(captions), "conversation": "plain"},
            train={"parts": ["projector"]},
            export={"merge_encoder": False},
            arguments=NO_CHECKPOINTS,
        )
    )
    before, after = load_file(new / "model.safetensors"), load_file(stage1 / "model.safetensors")
    assert moved(before, after) == {"mm_projector"}  # Apple's name; the encoder's statistics stay as well
    told: list[str] = []
    stage15 = run(
        recipe(
            output_dir=str(tmp_path / "stage1.5"),
            model={"path": str(stage1)},
            data={"source": str(captions), "questions": "generic"},
            export={"merge_encoder": False},
            arguments=NO_CHECKPOINTS,
        ),
        report=told.append,
    )
    assert any("encoder in train-time form, BatchNorm statistics updated" in line for line in told)
    between = load_file(stage15 / "model.safetensors")
    assert moved(after, between) == {"mm_projector", "vision_tower", "layers", "norm", "embed_tokens"}
    statistics_before, statistics_after = statistics(after), statistics(between)
    assert len(statistics_before) > 20
    assert all(not value.equal(statistics_after[name]) for name, value in statistics_before.items())
    final = run(
        recipe(
            output_dir=str(tmp_path / "stage2"),
            model={"path": str(stage15)},
            export={"dtype": "bfloat16"},
            arguments={"max_steps": 1, "save_steps": 1},
        )
    )
    model: Any = AutoModelForImageTextToText.from_pretrained(final)
    assert model.config.vision_config.reparameterized and model.dtype == torch.bfloat16
    trained: Any = AutoModelForImageTextToText.from_pretrained(final / "checkpoint-1")
    assert not trained.config.vision_config.reparameterized
    encoder = trained.eval().model.vision_tower
    encoder.reparameterize()  # in float32; what is rounded is the merged kernel, and not its branches
    expected = {name: value.bfloat16() for name, value in encoder.state_dict().items() if value.is_floating_point()}
    stored = model.model.vision_tower.state_dict()
    assert len(expected) > 50 and [name for name in expected if not torch.equal(expected[name], stored[name])] == []


@pytest.mark.parametrize("frozen", [None, True, False])
def test_batch_norm_follows_the_recipe(frozen: bool | None, recipe: MakeRecipe, checkpoint: Any) -> None:
    """None: a merged encoder, as the golden one is, keeps its statistics."""
    out = run(recipe(model={"image_size": 128, "freeze_batch_norm": frozen}, arguments=NO_CHECKPOINTS))
    before = statistics(load_file(checkpoint("qwen2_tied") / "model.safetensors"))
    after = statistics(load_file(out / "model.safetensors"))
    assert len(before) > 4 and before.keys() == after.keys()
    assert all(value.equal(after[name]) == (frozen is not False) for name, value in before.items())


def test_a_recipe_can_make_its_model(recipe: MakeRecipe, checkpoint: Callable[[str], Path]) -> None:
    new = {"vision": TRAIN_TIME, "language_model": str(checkpoint("qwen2_untied")), "seed": 3}
    out = run(recipe(model={"path": None, "new": new, "merge_encoder": True}, arguments=NO_CHECKPOINTS))
    model: Any = AutoModelForImageTextToText.from_pretrained(out)
    assert model.config.vision_config.reparameterized and model.config.vision_config.image_size == 128
