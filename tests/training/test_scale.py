# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does: DDP and FSDP2, adapters, resuming; and the configurations that the package ships."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from typer.testing import CliRunner

from transformers_fastvlm import FastVLMForConditionalGeneration
from transformers_fastvlm.cli import app
from transformers_fastvlm.training import Recipe, launch_config, list_launch_configs

pytest.importorskip("accelerate", reason="Trainer needs accelerate")
from processes import environment_of, launch, train

MakeRecipe = Callable[..., Recipe]

many = pytest.mark.skipif(
    sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="processes talk through gloo"
)

# i is a row with an image, t one of text alone. Two processes take them in turn: in the first update one of them has
# images and the other has none, in the second first none has, then both.
KINDS = "ititttii"


@pytest.fixture
def mixed(golden_batches: dict[str, Any], tmp_path: Path) -> Path:
    """A LLaVA file with rows of the kinds in `KINDS`."""
    samples = golden_batches["sft"]["samples"]
    of_kind = {"i": [row for row in samples if row.get("image")], "t": [row for row in samples if not row.get("image")]}
    rows = [{**of_kind[kind][number % len(of_kind[kind])], "id": str(number)} for number, kind in enumerate(KINDS)]
    file = tmp_path / "mixed.json"
    file.write_text(json.dumps([{key: value for key, value in row.items() if value is not None} for row in rows]))
    return file


@pytest.fixture
def written(recipe: MakeRecipe, mixed: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe for a directory: updates of four rows, one at a time, in four steps with two checkpoints."""

    def write(out: str, **sections: Any) -> Path:
        made = recipe(
            output_dir=str(tmp_path / out),
            model={"image_size": 64},
            data={"source": str(mixed), **sections.pop("data", {})},
            train={"global_batch_size": 4, "gradient_checkpointing": True, **sections.pop("train", {})},
            arguments={"per_device_train_batch_size": 1, **sections.pop("arguments", {})},
            **sections,
        )
        file = tmp_path / f"{out}.yaml"
        file.write_text(made.to_yaml())
        return file

    return write


def logged(out: Path, name: str) -> list[float]:
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def assert_close(first: Path, second: Path, file: str = "model.safetensors", tolerance: float = 1e-4) -> None:
    ours, theirs = load_file(first / file), load_file(second / file)
    assert ours.keys() == theirs.keys()
    far = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
    assert {name: value for name, value in far.items() if value > tolerance} == {}


@many
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_train_as_one(written: Callable[..., Path], mixed: Path, tmp_path: Path) -> None:
    """Losses, gradients, answers and weights, with images on one process and none on the other."""
    options = {
        "data": {"eval_source": str(mixed), "eval_options": {"limit": 4}},
        "train": {"sample_answers": 1},
        "arguments": {"per_device_eval_batch_size": 1, "max_steps": 2, "eval_steps": 2},
    }
    one = tmp_path / "one"
    train(written("one", **options))
    for how in ("ddp", "fsdp2"):
        two = tmp_path / how
        launch(train, written(how, **options), environment=environment_of(how))
        for name in ("loss", "grad_norm"):
            assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-4), (how, name)
            assert len(logged(two, name)) == 2
        assert_close(one, two)
        # Trainer weighs the tokens of rows that are evaluated at the same time, so its figure is a little different.
        assert logged(two, "eval_loss") == pytest.approx(logged(one, "eval_loss"), rel=0.02)
        assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()
        FastVLMForConditionalGeneration.from_pretrained(two)


@many
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"),
    reason="Transformers before 5.19 does not read an optimizer back on several processes of a CPU",
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp2", marks=pytest.mark.soak)])
def test_an_interrupted_run_of_two_processes_ends_as_if_it_had_not_been(
    how: str, written: Callable[..., Path], tmp_path: Path
) -> None:
    """In the middle of a later epoch, with grouped batches: the same rows in the same order."""
    options = {
        "data": {"group": True, "options": {"limit": 7}},
        "train": {"global_batch_size": 2},
        "arguments": {"max_steps": 8, "save_steps": 5},
    }
    environment = environment_of(how)
    launch(train, written("whole", **options), False, False, environment=environment)
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    launch(train, written("resumed", **options), True, False, environment=environment)
    for name in ("loss", "grad_norm", "epoch"):
        assert logged(tmp_path / "resumed", name) == logged(tmp_path / "whole", name), name
    assert_close(tmp_path / "whole", tmp_path / "resumed", tolerance=0)


@many
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp2", marks=pytest.mark.soak)])
def test_adapters_on_two_processes(how: str, written: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="adapters need peft")
    options = {
        "train": {"parts": ["projector"]},
        "lora": {"r": 4, "dropout": 0.0, "parts": ["language_model"]},
        "export": {"merge_lora": False},
        "arguments": {"max_steps": 2},
    }
    train(written("one", **options))
    launch(train, written("two", **options), environment=environment_of(how))
    assert logged(tmp_path / "two", "loss") == pytest.approx(logged(tmp_path / "one", "loss"), rel=1e-4)
    assert_close(tmp_path / "one", tmp_path / "two", "adapter_model.safetensors")


def test_the_configurations_say_what_they_are_for() -> None:
    assert list(list_launch_configs()) == ["ddp", "fsdp2", "zero2", "zero3"]
    assert list_launch_configs()["fsdp2"] == "FSDP2: weights, gradients and optimizer sharded over the devices"
    with pytest.raises(FileNotFoundError, match=r"no configuration 'fsdp'; did you mean 'fsdp2'\? .* has ddp, fsdp2"):
        launch_config("fsdp")
    printed = CliRunner().invoke(app, ["train", "--launch-config", "fsdp2"])
    assert printed.stdout.splitlines() == [str(launch_config("fsdp2"))] and launch_config("fsdp2").is_file()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_configurations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own parser, and without a warning; precision and accumulation are left to the recipe."""
    variables = environment_of(name)
    assert variables["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in variables
    assert (variables.get("ACCELERATE_USE_FSDP") == "true") == (name == "fsdp2")
    assert (variables.get("ACCELERATE_USE_DEEPSPEED") == "true") == name.startswith("zero")
    if name == "fsdp2":
        assert variables["FSDP_VERSION"] == "2" and variables["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    if name.startswith("zero"):
        from accelerate.utils import DeepSpeedPlugin

        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        plugin = DeepSpeedPlugin()
        settings = plugin.deepspeed_config
        assert settings["zero_optimization"]["stage"] == plugin.zero_stage == int(name[-1])
        assert settings["gradient_accumulation_steps"] == settings["gradient_clipping"] == "auto"
        assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (name == "zero3")
        assert plugin.zero3_init_flag == (name == "zero3")


@many
@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed, and a compiler for it")
@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_deepspeed_trains_as_one_process_does(how: str, written: Callable[..., Path], tmp_path: Path) -> None:
    train(written("one"))
    environment = {**environment_of(how), "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    launch(train, written("two", arguments={"use_cpu": False}), environment=environment)
    for name in ("loss", "grad_norm"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), rel=1e-4), name
    assert_close(tmp_path / "one", tmp_path / "two")


@many
@pytest.mark.soak
def test_accelerate_launch(written: Callable[..., Path], tmp_path: Path) -> None:
    """The command as the documentation has it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_config("ddp"))]
    command += ["--main_process_port", "0", "-m", "transformers_fastvlm", "train", str(written("out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [str(tmp_path / "out")]
    assert done.stderr.count("step 4/4: loss") == 1
    assert "update   4 rows = 1 x 2 devices x 2 accumulated; 4 updates" in done.stderr
    FastVLMForConditionalGeneration.from_pretrained(tmp_path / "out")
