# SPDX-License-Identifier: Apache-2.0
"""examples/finetune_lora.py: the tiny model learns with adapters what it was not trained for, and keeps it merged."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("accelerate", reason="Trainer needs accelerate")
pytest.importorskip("peft", reason="adapters need peft")

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "finetune_lora.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_lora", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def right(given: dict[str, list[str]], name: str) -> int:
    return sum(one == other for one, other in zip(given[name], given["expected"], strict=True))


def test_merged_answers_are_those_of_the_adapter(tmp_path: Path) -> None:
    given = example().main([str(tmp_path), "--rows", "320"])
    assert given["merged"] == given["adapter"]
    assert right(given, "before") < right(given, "adapter")


@pytest.mark.soak
def test_learns_to_read_dice(tmp_path: Path) -> None:
    given = example().main([str(tmp_path)])
    assert right(given, "before") < 40
    assert right(given, "adapter") > 108  # of 120
    assert given["merged"] == given["adapter"]
