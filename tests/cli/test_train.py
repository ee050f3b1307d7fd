# SPDX-License-Identifier: Apache-2.0
"""`fastvlm train`: what it lists, shows, refuses, and what a run leaves and prints."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transformers_fastvlm.training import list_recipes, load_recipe

Run = Callable[..., Any]
Fails = Callable[..., str]


@pytest.fixture
def changes(checkpoint: Callable[[str], Path], golden: Path, tmp_path: Path) -> list[str]:
    """Changes of the recipe `finetune` with which it trains a tiny model for two steps."""
    rows = json.loads((golden / "training.json").read_text())["sft"]["samples"]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(rows))
    return [
        f"model.path={checkpoint('qwen2_tied')}",
        "model.image_size=64",
        f"data.source={file}",
        f"data.image_folder={golden / 'images'}",
        f"output_dir={tmp_path / 'out'}",
        "train.global_batch_size=3",
        "train.gradient_checkpointing=false",
        "arguments.per_device_train_batch_size=3",
        "arguments.max_steps=2",
        "arguments.logging_steps=1",
        "arguments.use_cpu=true",
    ]


def test_the_recipes_are_listed(run: Run) -> None:
    lines = run("train", "--list").stdout.splitlines()
    assert {line.split()[0]: line.split(maxsplit=1)[1] for line in lines} == list_recipes()


def test_a_recipe_is_shown_as_it_would_run(run: Run, tmp_path: Path) -> None:
    shown = run("train", "stage2", "train.learning_rate=1e-4", "arguments.max_steps=5", "--show").stdout
    file = tmp_path / "mine.yaml"
    file.write_text(shown)
    assert load_recipe(file) == load_recipe("stage2", ["train.learning_rate=1e-4", "arguments.max_steps=5"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no recipe: give one of `fastvlm train --list`, or a YAML file"),
        (("stage4",), "There is no recipe 'stage4'; did you mean 'stage"),
        (("mine.yaml",), "mine.yaml does not exist; expected a recipe"),
        (("stage1", "train.part=[projector]"), "train has no key 'part'; did you mean 'parts'?"),
        (("stage1", "data.source"), "'data.source' is not a recipe override; expected key=value"),
        (("finetune", "model.path=gone/"), "no such directory: 'gone/'"),
        (("finetune", "model.path=null"), "output_dir is not set: name the directory"),
        (("finetune", "model.path=null", "output_dir=out"), "model.path is not set: name the directory"),
    ],
)
def test_input_that_cannot_be_used(
    words: tuple[str, ...], message: str, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    monkeypatch.chdir(tmp_path)
    assert message in fails("train", *words)
    assert list(tmp_path.iterdir()) == []


def test_models_of_other_kinds_are_refused(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert "has model_type 'qwen2'; expected a FastVLM" in fails("train", "finetune", f"model.path={tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "fast_vlm"}')
    assert "Convert it once: fastvlm convert" in fails("train", "finetune", f"model.path={tmp_path}")


def test_a_missing_package_is_named(fails: Fails, changes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # as where it is not installed
    assert 'needs accelerate: pip install "transformers-fastvlm[training]"' in fails("train", "finetune", *changes)


def test_a_dry_run_prints_the_plan_and_writes_nothing(run: Run, changes: list[str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    result = run("train", "finetune", *changes, "--dry-run")
    assert result.stdout == "" and not (tmp_path / "out").exists()
    assert "states no licence" not in result.stderr  # a tiny model is not Apple's
    for words in (
        "trains projector and language model",
        "trained, learning rate 2e-05",
        "3 rows = 3 x 1",
        "about ",
        "output   ",
    ):
        assert words in result.stderr


def test_a_run_prints_where_its_result_is(
    run: Run, fails: Fails, changes: list[str], golden: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    out = tmp_path / "out"
    result = run("train", "finetune", *changes)
    assert result.stdout == f"{out}\n"
    assert "step 2/2: loss " in result.stderr
    assert "it/s" not in result.stderr  # no bars where nobody is looking
    image = golden / "images" / "square_rgb.png"
    assert run("generate", image, "-p", "What?", "-m", out, "--max-new-tokens", 3).stdout.strip()
    assert "out already holds checkpoint-2, which is not overwritten. Resume it" in fails("train", "finetune", *changes)
    assert "is already finished" in run("train", "finetune", *changes, "--resume").stderr


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_bad_row_is_one_line(run: Run, changes: list[str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    quiet = ("arguments.dataloader_num_workers=1", f"data.image_folder={tmp_path}")  # the images are elsewhere
    said = run("train", "finetune", *changes, *quiet, code=2).stderr.splitlines()[-1]
    assert said.startswith(f"fastvlm: {tmp_path / 'train.json'}, row ") and "does not exist: expected a file" in said
    assert "Traceback" not in said


def test_out_of_memory_says_what_helps(run: Run, changes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    import torch
    from transformers import Trainer

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(Trainer, "training_step", full)
    said = run("train", "finetune", *changes, code=1).stderr.splitlines()[-1]
    assert said.startswith("fastvlm: out of memory. Set a smaller arguments.per_device_train_batch_size")


def test_the_launchers_files_are_named(run: Run, fails: Fails) -> None:
    assert Path(run("train", "--launch-config", "fsdp2").stdout.strip()).is_file()
    assert "fsdp2" in fails("train", "--launch-config", "fsdp3")


def test_a_run_ends_with_time_loss_best_step_and_a_command_to_copy(
    run: Run, changes: list[str], golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    out = tmp_path / "out"
    turns = [{"from": "human", "value": "<image>\nWhat's this?"}, {"from": "gpt", "value": "Stripes."}]
    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"image": "wide_rgb.png", "conversations": turns}] * 3))
    evaluation = (f"data.eval_source={file}", "arguments.eval_strategy=steps", "arguments.eval_steps=1")
    monkeypatch.chdir(tmp_path)
    lines = run("train", "finetune", *changes, *evaluation).stderr.splitlines()
    lines = lines[lines.index(f"finished: {out}") :]
    labels = [line.split(maxsplit=1)[0] for line in lines]
    assert labels == ["finished:", "time", "loss", "eval", "next"]
    assert re.fullmatch(r"time     0:0\d:\d\d for 2 steps, [\d.e-]+ s each", lines[1])
    logged = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    for line, key in ((lines[2], "loss"), (lines[3], "eval_loss")):
        values = {entry["step"]: entry[key] for entry in logged if key in entry}
        best = min(values, key=lambda step: values[step])
        assert line.split(maxsplit=1)[1] == f"{values[2]:.4g} at step 2; best {values[best]:.4g} at step {best}"
    words = shlex.split(lines[4].removeprefix("next     "))
    assert words[:2] == ["fastvlm", "generate"] and words[-2:] == ["-m", str(out)]
    assert words[2] == str(golden / "images" / "wide_rgb.png")
    assert run(*words[1:], "--max-new-tokens", 3).stdout.strip()
    monkeypatch.chdir(golden)
    again = run("train", "finetune", *changes, "arguments.max_steps=3", "--resume").stderr
    assert " for 1 steps" in again and "fastvlm generate images/wide_rgb.png -p 'What'" in again
