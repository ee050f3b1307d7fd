# SPDX-License-Identifier: Apache-2.0
"""`fastvlm new`: a model of two sources, and sources that cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

Run = Callable[..., Any]


@pytest.fixture
def language_model(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Qwen3 with its tokenizer, as one would find it on the hub."""
    out = tmp_path / "qwen3"
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(checkpoint("qwen2_tied") / file, out)
    return out


def test_a_model_is_made_and_ready_for_stage_1(
    run: Run, language_model: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    words = ("--vision", checkpoint("llama"), "--language-model", language_model)
    out = tmp_path / "new"
    result = run("new", out, *words, "--image-size", 128, "--dtype", "bfloat16", "--seed", 7)
    assert result.stdout == f"{out}\n"
    model: Any = AutoModelForImageTextToText.from_pretrained(out)
    parts = [model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model]
    for part, name in zip(parts, ("vision_tower", "projector", "language_model"), strict=True):
        number = sum(parameter.numel() for parameter in part.parameters())
        if name == "language_model" and not model.config.tie_word_embeddings:
            number += model.lm_head.weight.numel()
        assert f"{name:<15}{number:>15,} parameters" in result.stderr
    assert "qwen3, 128x128 pixels, <image> is 483" in result.stderr
    assert model.dtype == torch.bfloat16 and AutoProcessor.from_pretrained(out).image_token_id == 483

    run("new", tmp_path / "again", *words, "--image-size", 128, "--dtype", "bfloat16", "--seed", 7)
    other: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    shown = run("train", "stage1", f"model.path={out}", "--show").stdout
    assert f"path: {out}" in shown


def test_sources_that_cannot_be_used(
    fails: Callable[..., str], language_model: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    vision = checkpoint("qwen2_tied")
    out = tmp_path / "new"
    assert "no such directory: 'gone/'" in fails("new", out, "--vision", "gone/", "--language-model", language_model)
    assert "expected a FastViTHD" in fails("new", out, "--vision", language_model, "--language-model", language_model)
    words = ("--vision", vision, "--language-model", language_model)
    assert "image_size is 100, expected a positive multiple of 64" in fails("new", out, *words, "--image-size", 100)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "exists and is not an empty directory" in fails("new", out, *words)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_apples_licence_is_named(
    run: Run, language_model: Path, copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    vision = copy_of("qwen2_tied")
    (vision / "LICENSE").write_text("Apple Machine Learning Research Model License")
    config = json.loads((vision / "config.json").read_text())
    assert config["model_type"] == "llava_qwen2"
    result = run("new", tmp_path / "new", "--vision", vision, "--language-model", language_model)
    assert "Apple's weights are for research only" in result.stderr
