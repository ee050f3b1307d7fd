# SPDX-License-Identifier: Apache-2.0
"""`fastvlm data check`: what it prints, its exit codes, and that a run can leave out what it found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transformers_fastvlm import data

Run = Callable[..., Any]


def llava(image: str | None, answer: str = "A cat.") -> dict[str, Any]:
    question = "What?" if image is None else "<image>\nWhat?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({} if image is None else {"image": image})


@pytest.fixture
def good(golden: Path, tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    shutil.copy(golden / "images" / "tiny_rgb.png", tmp_path / "images")
    path = tmp_path / "good.json"
    path.write_text(json.dumps([llava("tiny_rgb.png"), llava(None, "Words. " * 30), llava("tiny_rgb.png")]))
    return path


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    path = tmp_path / "bad.jsonl"
    rows = [llava("tiny_rgb.png"), llava("gone.png"), llava(None, ""), llava(None)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_good_set(run: Run, good: Path, tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    words = ("data", "check", good, "--image-folder", tmp_path / "images")
    result = run(*words)
    assert result.stdout == "3 rows read, 3 valid (1 of them text only), 2 images, 0 problems\n"
    assert result.stderr == ""
    lines = run(*words, "-m", checkpoint("qwen2_tied"), "--max-length", 60).stdout.splitlines()
    assert lines[0] == result.stdout.strip()
    assert "tokens; a row: min 5" in lines[1]
    assert lines[2] == "1 rows are longer than 60 tokens and will be truncated"
    assert run(*words, "--limit", 1).stdout.startswith("1 of 3 rows read, 1 valid (0 of them")


def test_a_bad_set(run: Run, bad: Path, tmp_path: Path) -> None:
    words = ("data", "check", bad, "--image-folder", tmp_path / "images")
    lines = run(*words, code=1).stdout.splitlines()
    assert lines[0].startswith("row 1 (line 2): the image 'gone.png' does not exist")
    assert lines[1].startswith("row 2 (line 3): answer 0 (counting from 0) is empty")
    assert lines[2] == "4 rows read, 2 valid (1 of them text only), 1 images, 2 problems"
    result = run(*words, "--show", 1, code=1)
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr == "1 more rows are wrong; --show lists more, --json all.\n"
    report = json.loads(run(*words, "--json", "--show", 0, code=1).stdout)
    assert (report["ok"], report["rows"], [problem["row"] for problem in report["problems"]]) == (False, 4, [1, 2])
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert len(data.load(bad, tmp_path / "images", exclude=tmp_path / "report.json")) == 2


def test_a_file_that_is_cut_off(run: Run, good: Path, tmp_path: Path) -> None:
    good.write_text(good.read_text()[:-10])
    lines = run("data", "check", good, "--image-folder", tmp_path / "images", code=1).stdout.splitlines()
    assert lines[0].startswith("row 2: the file ends inside this row")
    assert lines[1] == "2 rows read, 2 valid (1 of them text only), 1 images, 1 problems"


def test_input_that_cannot_be_used(fails: Callable[..., str], good: Path, tmp_path: Path) -> None:
    assert "gone.json" in fails("data", "check", tmp_path / "gone.json")
    assert "is not a folder" in fails("data", "check", good, "--image-folder", good)
    assert "--max-length and --conversation need --model" in fails("data", "check", good, "--max-length", 9)
    assert "no config.json" in fails("data", "check", good, "-m", tmp_path)
    good.write_text("nonsense")
    assert "expected a JSON list of rows" in fails("data", "check", good)


def test_help(run: Run) -> None:
    assert "check" in run("data", "--help").stdout
    assert "--image-folder" in run("data", "check", "--help").stdout
