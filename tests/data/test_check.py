# SPDX-License-Identifier: Apache-2.0
"""Checking a data set: every kind of problem by its row, and counts that are those of the batches."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transformers_fastvlm import FastVLMProcessor, data
from transformers_fastvlm.data import FastVLMDataCollator, SampleError, check_dataset

# Python 3.12 and newer; the workers of a data loader are forked by default.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes"),  # on a machine of one core
]

Row = dict[str, Any]


def llava(question: str = "<image>\nWhat?", answer: str = "A cat.", **more: Any) -> Row:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("wide_rgb.png", "tall_rgb.jpg", "gray_l.png"):
        shutil.copy(golden / "images" / name, folder)
    (folder / "cut.jpg").write_bytes((folder / "tall_rgb.jpg").read_bytes()[:-200])
    return folder


@pytest.fixture
def rows() -> list[Row]:
    return [
        llava(image="wide_rgb.png", id="a"),
        llava("<image><image>Which?", "The second.", image=["tall_rgb.jpg", "gray_l.png"]),
        llava("Words?", "Some words. " * 20),
        llava(image="missing.png", id="b"),
        llava(image="cut.jpg"),
        llava(answer="", image="wide_rgb.png"),
        llava(image="../wide_rgb.png"),
        llava("No more?", "No."),
    ]


PROBLEMS = [
    (3, "b", "image", "the image 'missing.png' does not exist"),
    (4, None, "image", "the image 'cut.jpg' is truncated or damaged"),
    (5, None, "row", "answer 0 (counting from 0) is empty"),
    (6, None, "row", "leaves the image folder"),
]


def check_problems(report: data.Report, line: int | None) -> None:
    assert len(report.problems) == len(PROBLEMS) and not report.ok
    for found, (row, sample_id, kind, message) in zip(report.problems, PROBLEMS, strict=True):
        assert (found.row, found.id, found.kind) == (row, sample_id, kind) and message in found.message
        assert found.line == (None if line is None else row + line)
        assert str(found).startswith(f"row {row}")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_problems_by_row(folder: Path, rows: list[Row], num_workers: int, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_dataset(path, folder, num_workers=num_workers, progress=lambda *step: seen.append(step))
    check_problems(report, 1)
    assert (report.source, report.rows, report.checked) == (str(path), 8, 8)
    assert (report.images, report.text_only, report.tokens, report.longer) == (3, 2, None, None)
    assert seen == [(number, 8) for number in range(1, 9)]
    assert json.loads(json.dumps(report.to_dict()))["problems"][0]["line"] == 4
    check_problems(check_dataset(rows, folder), None)


@pytest.mark.parametrize("name", ["qwen2_tied", "llama", "qwen2_anyres"])
def test_tokens_are_the_collator_s(checkpoint: Callable[[str], Path], folder: Path, rows: list[Row], name: str) -> None:
    processor = FastVLMProcessor.from_pretrained(checkpoint(name))
    good = [rows[0], rows[1], rows[2], rows[7]]
    batch = FastVLMDataCollator(processor)(list(data.load(good, folder)))
    lengths = batch["attention_mask"].sum(1).numpy()
    report = check_dataset(good, folder, processor=processor)
    assert report.ok and report.tokens == {
        "total": lengths.sum(),
        "min": lengths.min(),
        "mean": round(float(lengths.mean()), 1),
        "max": lengths.max(),
        "median": np.median(lengths),
        "p95": np.percentile(lengths, 95),
        "p99": np.percentile(lengths, 99),
    }


def test_rows_that_are_cut_and_that_cannot_be(checkpoint: Callable[[str], Path], folder: Path, rows: list[Row]) -> None:
    """What the check says of a length is what the collator does with it."""
    processor = FastVLMProcessor.from_pretrained(checkpoint("qwen2_tied"))
    good = [rows[0], rows[1], rows[2], rows[7]]
    samples = list(data.load(good, folder))
    for max_length in (20, 45, 60, 100, 1000):
        report = check_dataset(good, folder, processor=processor, max_length=max_length)
        collator = FastVLMDataCollator(processor, max_length=max_length)
        refused, cut = {}, 0
        for row, sample in enumerate(samples):
            try:
                whole = FastVLMDataCollator(processor)([sample])["input_ids"].shape[1]
                cut += collator([sample])["input_ids"].shape[1] < whole
            except SampleError as error:
                refused[row] = str(error)
        assert {problem.row: problem.kind for problem in report.problems} == dict.fromkeys(refused, "length")
        assert all(refused[problem.row].endswith(problem.message) for problem in report.problems)
        assert report.longer == cut
    assert (len(refused), cut) == (0, 0)
    assert check_dataset(good, folder, processor=processor, max_length=20).problems


def test_plain(checkpoint: Callable[[str], Path], folder: Path, rows: list[Row]) -> None:
    processor = FastVLMProcessor.from_pretrained(checkpoint("qwen2_tied"))
    report = check_dataset(rows[:3], folder, processor=processor, conversation="plain")
    assert [problem.row for problem in report.problems] == [1, 2]
    assert "conversation='plain' expects a caption" in report.problems[0].message


@pytest.mark.parametrize("layout", ["json", "jsonl"])
def test_a_file_that_is_cut_off(folder: Path, rows: list[Row], tmp_path: Path, layout: str) -> None:
    """The rows before the cut are read all the same."""
    path = tmp_path / f"train.{layout}"
    path.write_text(json.dumps(rows[:4]) if layout == "json" else "\n".join(map(json.dumps, rows[:4])))
    path.write_text(path.read_text()[:-30])
    report = check_dataset(path, folder)
    assert report.rows == report.checked == 3 and report.images == 3
    (problem,) = report.problems
    assert (problem.row, problem.kind) == (3, "file")
    assert ("cut off" if layout == "jsonl" else "the file ends inside this row") in problem.message
    saved = tmp_path / "report.json"
    saved.write_text(json.dumps(report.to_dict()))
    path.write_text(json.dumps(rows[:3]))
    with pytest.raises(ValueError, match="or its file is damaged"):
        data.load(path, folder, exclude=saved)


def test_limit_and_thin_images(folder: Path, rows: list[Row]) -> None:
    Image.new("L", (10_000, 1)).save(folder / "thin.png")
    report = check_dataset([llava(image="thin.png"), *rows], folder, limit=3)
    assert report.ok and (report.rows, report.checked, report.images) == (9, 3, 4)


def test_sizes_are_found_with_less_work_and_the_same_errors(folder: Path) -> None:
    """A JPEG is decoded at an eighth of its size, which must notice all that decoding it whole notices."""
    opener = data.load([llava()], folder).image_folder(0)

    def outcome(open_: Callable[[str], Any]) -> Any:
        try:
            found = open_("damaged.jpg")
        except SampleError as error:
            return str(error)
        return found if isinstance(found, tuple) else found.size[::-1]

    whole = (folder / "tall_rgb.jpg").read_bytes()
    seen = set()
    for step in range(0, len(whole), len(whole) // 30):
        for content in (whole[:step], whole[:step] + b"\0\xff\xd9" + whole[step + 3 :]):
            (folder / "damaged.jpg").write_bytes(content)
            expected = outcome(opener.open)
            assert outcome(opener.size_of) == expected
            seen.add(expected)
    assert len(seen) > 3
    assert opener.size_of("wide_rgb.png") == opener.open("wide_rgb.png").size[::-1]


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length and conversation need a processor"):
        check_dataset([llava()], max_length=10)
    with pytest.raises(ValueError, match="has no rows"):
        check_dataset([])
    with pytest.raises(NotADirectoryError):
        check_dataset([llava()], tmp_path / "gone")
