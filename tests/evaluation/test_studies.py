# SPDX-License-Identifier: Apache-2.0
"""The studies of the tiny model: their documented tables are the record's, and the script does what it says."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_fastvlm import FastViTHDModel
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "benchmarks" / "results" / "studies.json"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """benchmarks/studies.py as a module."""
    own = ("studies", "tiny_accuracy", "_results")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("studies")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in own:
        sys.modules.pop(name, None)


def test_documented_tables_are_the_records(script: Any) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    page = (ROOT / "benchmarks" / "STUDIES.md").read_text(encoding="utf-8")
    assert [name for name, cells in record["studies"].items() if script.table(cells) not in page] == []
    assert page.count("|---|---|---|---|---|---|") == len(record["studies"])
    assert f"{record['scenes']} scenes" in page


def test_the_record_has_the_scripts_cells(script: Any) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    cells = {name: [cell.name for cell in own] for name, own in script.studies(256).items()}
    assert {name: [cell["cell"] for cell in own] for name, own in record["studies"].items()} == cells


@torch.no_grad()
def test_the_train_time_form_computes_the_same_before_and_after_merging(script: Any) -> None:
    merged = FastViTHDModel.from_pretrained(tiny_checkpoint(), dtype="float32").eval()
    made = script.train_time_form(merged)
    assert not made.config.reparameterized and merged.config.reparameterized
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    expected = merged(pixels).last_hidden_state

    def error() -> float:
        return float((made(pixels).last_hidden_state - expected).norm() / expected.norm())

    assert error() < 1e-5
    # It is a form with branches that all count: without one of them it computes something else.
    scale = made.network[0][0].token_mixer.layer_scale
    before = scale.clone()
    scale.mul_(0.5)
    assert error() > 1e-2
    scale.copy_(before)
    made.reparameterize()
    assert error() < 1e-5
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(made.state_dict()[name], tensor, atol=1e-5), name


def test_further_images(script: Any) -> None:
    scenes = SceneDataset(3, seed=5)
    plain = scenes[1]
    row = script.WithOthers(scenes, "scenes-before", 2)[1]
    assert row["messages"][0]["content"] == "<image>\n<image>\n" + plain["messages"][0]["content"]
    assert row["messages"][1] == plain["messages"][1] and len(row["images"]) == 3
    assert row["images"][2].tobytes() == plain["images"][0].tobytes()
    after = script.WithOthers(scenes, "scenes-after", 2)[1]
    assert after["images"][0].tobytes() == plain["images"][0].tobytes()
    assert [image.tobytes() for image in after["images"][1:]] == [image.tobytes() for image in row["images"][:2]]
    black = script.WithOthers(scenes, "black-before", 1)[1]
    assert black["images"][0].getextrema() == ((0, 0),) * 3 and len(black["images"]) == 2


def test_cells_are_compared_question_by_question(script: Any) -> None:
    rows = [{"messages": [{"content": "q"}, {"content": answer}]} for answer in "abcd"]
    found = script.compare(rows, ["a", "b", "x", "d"], ["a", "y", "z", "d"], "name")
    assert (found["percent"], found["points"], found["other_answers"]) == (75.0, 25.0, 2)
    assert found["points_interval"][0] == 0.0 and "points" not in script.compare(rows, list("abcd"), None, "name")


def test_other_studies_of_a_record_are_kept(script: Any, tmp_path: Path) -> None:
    file = tmp_path / "studies.json"
    assert script.kept(file, 5, ["form"]) == {} and script.kept(None, 5, ["form"]) == {}
    file.write_text(json.dumps({"scenes": 5, "studies": {"form": [1], "tiles": [2]}}))
    assert script.kept(file, 5, ["form"]) == {"tiles": [2]}
    with pytest.raises(SystemExit, match="of 5 scenes and not of 6"):
        script.kept(file, 6, ["form"])
