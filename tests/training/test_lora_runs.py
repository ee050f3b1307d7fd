# SPDX-License-Identifier: Apache-2.0
"""Whole runs with adapters: what they leave, merged or not, and that one which was interrupted ends the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers import golden_images, relative_error
from transformers_fastvlm import compat
from transformers_fastvlm.training import Recipe, load_recipe, merge_adapter, run

pytest.importorskip("accelerate", reason="Trainer needs accelerate")
pytest.importorskip("peft", reason="adapters need peft")

MakeRecipe = Callable[..., Recipe]
SMALL = {"image_size": 64}
LORA = {"r": 4, "alpha": 16, "dropout": 0.1}


def answer(directory: Path, golden: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits for a question about an image, and the answer, of what a directory holds."""
    model: Any = AutoModelForImageTextToText.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)
    inputs = processor(text="<image>\nWhat?", images=golden_images(golden, ["wide_rgb.png"]), return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (64, 64)
    with torch.no_grad():
        return model(**inputs).logits, model.generate(**inputs, max_new_tokens=6, do_sample=False)


def test_merged_and_unmerged_results_are_the_same_model(
    recipe: MakeRecipe, golden: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    told: list[str] = []
    train = {"parts": ["projector"], "learning_rate": 1e-2, "gradient_checkpointing": True}
    for name, merged in (("whole", True), ("adapter", False)):
        made = recipe(
            output_dir=str(tmp_path / name),
            model=SMALL,
            train=train,
            lora=LORA,
            export={"merge_lora": merged},
            arguments={"max_steps": 2},
        )
        run(made, report=told.append)
    assert any(line.startswith("  language_model") and "trained, learning rate 0.01" in line for line in told)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert {"lora" in name or "multi_modal_projector" in name for name in stored} == {True}

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    logits, tokens = answer(tmp_path / "whole", golden)
    for other in ("adapter", "merged"):
        if other == "adapter" and compat.ADAPTERS_LOSE_WHOLE_PARTS:
            with pytest.raises(ValueError, match="comes with a trained multi_modal_projector, which"):
                answer(tmp_path / other, golden)
            continue
        others_logits, others_tokens = answer(tmp_path / other, golden)
        assert relative_error(others_logits, logits) < 1e-4, other
        assert others_tokens.equal(tokens), other

    base = load_file(checkpoint("qwen2_tied") / "model.safetensors")
    for folder in ("whole", "merged"):
        out = load_file(tmp_path / folder / "model.safetensors")
        assert set(out) == set(base) - {"lm_head.weight"}  # the head is tied
        moved = {name for name in out if not out[name].equal(base[name])}
        decoder = {name for name in base if ".layers." in name and name.endswith("_proj.weight")}
        assert moved == decoder | {name for name in base if ".mm_projector." in name}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "llava_qwen2"


def test_an_interrupted_run_ends_as_if_it_had_not_been(recipe: MakeRecipe, tmp_path: Path) -> None:
    def made(out: str) -> Recipe:
        return recipe(
            output_dir=str(tmp_path / out), model=SMALL, train={"parts": []}, lora=LORA, export={"merge_lora": False}
        )

    run(made("whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run(made("resumed"), resume=True)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert first.keys() == second.keys() and len(first) == 42
    assert [name for name in first if not first[name].equal(second[name])] == []


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_the_recipes_of_the_package(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.lora is not None and recipe.train.parts == [] and recipe.lora.parts == ["language_model"]
    assert recipe.lora.quantization == ("4bit" if name == "qlora" else None)
