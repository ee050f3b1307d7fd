# SPDX-License-Identifier: Apache-2.0
"""Sample answers are written down while a run evaluates, and change nothing of it."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from transformers_fastvlm.training import Recipe, run
from transformers_fastvlm.training.callbacks import untouched

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

MakeRecipe = Callable[..., Recipe]


def test_a_model_is_left_as_it_was(load_tiny: Callable[[], tuple[Any, Any]]) -> None:
    model, _ = load_tiny()
    model.train()
    model.model.language_model.eval()
    modes = [module.training for module in model.modules()]
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()
    with pytest.raises(RuntimeError, match="stop"), untouched(model):  # noqa: PT012
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        torch.rand(1), random.random(), np.random.rand()
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert str(np.random.get_state()) == str(states[2])


@pytest.mark.parametrize("conversation", ["sft", "plain"])
def test_answers_are_written_and_training_is_the_same_without_them(
    conversation: str, recipe: MakeRecipe, golden_batches: dict[str, Any], tmp_path: Path
) -> None:
    rows = golden_batches[conversation]["samples"]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    told: list[str] = []
    for answers in (2, 0):
        made = recipe(
            output_dir=str(tmp_path / str(answers)),
            model={"image_size": 64, "drop_path_rate": 0.5},
            data={
                "source": str(file),
                "eval_source": str(file),
                "eval_options": {"limit": 3},
                "conversation": conversation,
            },
            train={"sample_answers": answers},
            arguments={"max_steps": 2, "eval_steps": 1, "save_strategy": "no"},
        )
        run(made, report=told.append)
    lines = [json.loads(line) for line in (tmp_path / "2" / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["id"]) for line in lines] == [(s, row["id"]) for s in (1, 2) for row in rows[:2]]
    first = rows[0]["conversations"]
    expected = first[-1]["value"]
    prompt = "<image>" if conversation == "plain" else first[-2]["value"].replace("<image>", "").strip()
    assert lines[0]["expected"] == expected and lines[0]["prompt"] == prompt
    assert any(line.startswith(f"step 1: {prompt!r} -> ") for line in told)
    assert not (tmp_path / "0" / "samples.jsonl").exists()
    with_answers, without = (load_file(tmp_path / name / "model.safetensors") for name in ("2", "0"))
    assert [name for name in without if not torch.equal(without[name], with_answers[name])] == []


def test_answers_reach_tensorboard(recipe: MakeRecipe, rows_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    made = recipe(
        model={"image_size": 64},
        data={"eval_source": str(rows_file), "eval_options": {"limit": 1}},
        train={"sample_answers": 1},
        arguments={"max_steps": 1, "eval_steps": 1, "save_strategy": "no", "report_to": "tensorboard"},
    )
    run(made)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert "train/loss" in events.Tags()["scalars"]
    [event] = events.Tensors("samples/0/text_summary")
    assert b"What number is on it?" in event.tensor_proto.string_val[0] and event.step == 1


def test_on_a_terminal_lines_stand_above_the_bar(
    recipe: MakeRecipe, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    reported: list[str] = []

    def report(line: str) -> None:
        reported.append(line)
        terminal.write(line + "\n")

    made = recipe(
        model={"image_size": 64},
        data={"eval_source": str(rows_file), "eval_options": {"limit": 2}},
        train={"sample_answers": 1},
        arguments={"max_steps": 2, "eval_steps": 2, "save_strategy": "no", "disable_tqdm": False},
    )
    run(made, report=report)
    shown = terminal.getvalue()
    assert "2/2" in shown and "{'" not in shown
    logged = [line for line in reported if line.startswith("step ")]
    assert len([line for line in logged if "loss" in line]) >= 2 and any("(expected" in line for line in logged)
    for line in logged:
        before = shown[: shown.index(line + "\n")]
        assert before.endswith(("\n", "\r", "\x1b[A")), (line, before[-80:])  # the start of a line
