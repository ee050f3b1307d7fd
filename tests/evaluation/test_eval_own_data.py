# SPDX-License-Identifier: Apache-2.0
"""A user's own questions: read, and refused with the row's name, before any model is loaded."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transformers_fastvlm.evaluation.own_data import read_own_data
from transformers_fastvlm.evaluation.tasks import import_harness


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 6), "red").save(tmp_path / "data" / "red.png")
    Image.new("RGB", (8, 6), "blue").save(tmp_path / "data" / "blue.png")
    Image.new("RGB", (8, 6), "green").save(tmp_path / "outside.png")
    return tmp_path / "data"


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "my questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


GOOD = {"image": "red.png", "question": "Colour?", "answer": "red"}


def test_rows_with_one_image_several_and_none(folder: Path) -> None:
    file = write(
        folder,
        GOOD,
        {"images": ["blue.png", "red.png"], "question": "Same?", "answers": ["no", "different"]},
        {"question": "2 + 3?", "answer": 5},
    )
    data = read_own_data(file, "exact")
    assert data.name == "my_questions"
    assert [document["question"] for document in data.documents] == ["Colour?", "Same?", "2 + 3?"]
    assert [document["answers"] for document in data.documents] == [["red"], ["no", "different"], ["5"]]
    assert [[image.getpixel((0, 0)) for image in data.open_images(row)] for row in range(3)] == [
        [(255, 0, 0)],
        [(0, 0, 255), (255, 0, 0)],
        [],
    ]
    assert len(read_own_data(file, "exact", limit=2).documents) == 2


def test_a_changed_image_changes_the_stamp_of_its_rows_only(folder: Path) -> None:
    file = write(folder, GOOD, GOOD | {"image": "blue.png"})
    before = [document["stamp"] for document in read_own_data(file, "exact").documents]
    Image.new("RGB", (80, 60), "red").save(folder / "red.png")
    after = [document["stamp"] for document in read_own_data(file, "exact").documents]
    assert before[0] != after[0]
    assert before[1] == after[1]


@pytest.mark.parametrize(
    ("row", "metric", "message"),
    [
        ({"image": "red.png", "question": "Colour?"}, "exact", "the answer is None; expected"),
        (GOOD | {"answer": None}, "exact", "the answer is None; expected"),
        (GOOD | {"answers": []}, "exact", r"the answer is \[\]; expected"),
        (GOOD | {"question": " "}, "exact", "question is ' '; expected"),
        (GOOD | {"image": "gone.png"}, "exact", "'gone.png' cannot be read: No such file"),
        (GOOD | {"image": "../outside.png"}, "exact", "leaves the image folder"),
        (GOOD | {"image": "/etc/hostname"}, "exact", "leaves the image folder"),
        (GOOD | {"image": "https://example.com/a.png"}, "exact", "URLs are not fetched"),
        (GOOD | {"image": 7}, "exact", r"an image is 7 \(int\)"),
        (GOOD | {"answer": "b"}, "letter", "expects capital letters"),
        (GOOD | {"answers": ["red"] * 3}, "vqa", "there are 3 answers"),
        (["red.png"], "exact", "is a JSON list|is a list"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(folder: Path, row: Any, metric: str, message: str) -> None:
    good = GOOD | {"answers": ["A"] * 4}
    with pytest.raises(ValueError, match=message) as caught:
        read_own_data(write(folder, good, row), metric)
    assert "my questions.jsonl, row 1 (line 2" in str(caught.value)


def test_an_image_that_cannot_be_decoded_is_named_when_it_is_opened(folder: Path) -> None:
    (folder / "red.png").write_bytes((folder / "red.png").read_bytes()[:45])
    data = read_own_data(write(folder, GOOD), "exact")
    with pytest.raises(ValueError, match=r"row 0 \(line 1\).*'red.png'"):
        data.open_images(0)


def test_data_that_are_not_there_or_empty(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        read_own_data(folder / "gone.jsonl", "exact")
    (folder / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty"):
        read_own_data(folder / "empty.jsonl", "exact")
    with pytest.raises(ValueError, match="metric is 'bleu'; expected one of exact"):
        read_own_data(write(folder, GOOD), "bleu")


def test_parquet_and_saved_data_sets(folder: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="data sets are read with Hugging Face's datasets")
    rows = {
        "image": [str(folder / "red.png"), str(folder / "blue.png")],
        "question": ["Colour?"] * 2,
        "answers": [["red"], ["blue", "navy"]],
    }
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(folder / "some.parquet")
    dataset.save_to_disk(folder / "saved")
    for path in (folder / "some.parquet", folder / "saved"):
        data = read_own_data(path, "exact")
        assert [document["answers"] for document in data.documents] == [["red"], ["blue", "navy"]]
        assert [data.open_images(row)[0].getpixel((0, 0)) for row in range(2)] == [(255, 0, 0), (0, 0, 255)]
    datasets.DatasetDict(test=dataset).save_to_disk(folder / "splits")
    with pytest.raises(ValueError, match=r"has the splits test; name the folder of one"):
        read_own_data(folder / "splits", "exact")
    assert len(read_own_data(folder / "splits" / "test", "exact").documents) == 2
    (folder / "bad.parquet").write_bytes(b"PAR1 nothing else")
    with pytest.raises(ValueError, match=r"bad.parquet cannot be read as Parquet"):
        read_own_data(folder / "bad.parquet", "exact")
    with pytest.raises(ValueError, match=r"expected a .jsonl, .json or .parquet file"):
        read_own_data(folder / "red.png", "exact")


def test_without_lmms_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)  # where lmms-eval is installed
    with pytest.raises(ImportError, match=r'needs lmms-eval: pip install "transformers-fastvlm\[eval\]"'):
        import_harness()
