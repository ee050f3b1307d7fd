# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the training tests: the golden batches as data, and recipes of runs that take seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transformers_fastvlm import FastVLMForConditionalGeneration, FastVLMProcessor
from transformers_fastvlm.training import Recipe


@pytest.fixture(scope="session")
def golden_batches(golden: Path) -> dict[str, Any]:
    """The batches "sft" and "plain" of the reference: samples, ids, labels, loss and gradient norms."""
    return json.loads((golden / "training.json").read_text())


@pytest.fixture
def load_tiny(checkpoint: Callable[[str], Path]) -> Callable[[], tuple[Any, FastVLMProcessor]]:
    """Load a new copy of the golden model, with its processor."""
    directory = checkpoint("qwen2_tied")
    return lambda: (
        FastVLMForConditionalGeneration.from_pretrained(directory),
        FastVLMProcessor.from_pretrained(directory),
    )


@pytest.fixture(scope="session")
def rows_file(golden: Path, golden_batches: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA file of twelve rows: the golden samples, four times."""
    samples = golden_batches["sft"]["samples"]
    rows = [{**row, "id": f"{row['id']}-{number}"} for number in range(4) for row in samples]
    for row in rows:
        if row.get("image") is None:
            row.pop("image", None)
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture
def recipe(checkpoint: Callable[[str], Path], golden: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Return a recipe that trains the golden model on the golden rows; keywords replace parts of sections."""

    def make(**sections: dict[str, Any]) -> Recipe:
        content: dict[str, Any] = {
            "name": "test",
            "output_dir": str(tmp_path / "out"),
            "model": {"path": str(checkpoint("qwen2_tied"))},
            "data": {"source": str(rows_file), "image_folder": str(golden / "images")},
            "train": {"learning_rate": 1e-3, "global_batch_size": 2, "precision": "float32"},
            "arguments": {
                "per_device_train_batch_size": 2,
                "max_steps": 4,
                "logging_steps": 1,
                "save_steps": 2,
                "use_cpu": True,
                "disable_tqdm": True,
            },
        }
        for name, values in sections.items():
            content[name] = {**content.get(name, {}), **values} if isinstance(values, dict) else values
        return Recipe.from_dict(content)

    return make
