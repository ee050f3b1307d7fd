# SPDX-License-Identifier: Apache-2.0
"""A few steps of benchmarks/train_retrieval.py: the loss falls, and scenes are found better than by chance."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """benchmarks/train_retrieval.py as a module."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate, of the extra training")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("train_retrieval")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in ("train_retrieval", "_results"):
        sys.modules.pop(name, None)


def test_descriptions_of_held_out_scenes_are_all_different(script: Any) -> None:
    scenes = script.unlike(2026, 40)
    assert len({scene.caption for scene in scenes}) == len(scenes) == 40
    assert script.TRAINING_SERIES != script._results.HELD_OUT_SERIES


def test_a_few_steps_teach_to_find_scenes(script: Any) -> None:
    held_out = script.unlike(2026, 100)
    before = script.measured(script.Embedder("tiny", dtype="float32"), held_out)
    embedder, losses = script.train(scenes=512, batch_size=64, epochs=2, learning_rate=1e-3)
    after = script.measured(embedder, held_out)
    assert losses[-1] < losses[0]
    assert after["recall_at_10"] > max(25.0, before["recall_at_10"]), "by chance: 10 percent"
