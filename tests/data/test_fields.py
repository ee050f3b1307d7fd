# SPDX-License-Identifier: Apache-2.0
"""What the fields of a row mean is the same for the loader, the collator, the check, batches and the evaluation."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transformers_fastvlm import FastVLMProcessor, data
from transformers_fastvlm.data import FastVLMDataCollator, SampleError
from transformers_fastvlm.evaluation.own_data import read_own_data

Row = dict[str, Any]

SHOWN = {"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red."}]}
TEXT = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}]}
LLAVA = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]}
RED = Image.new("RGB", (8, 6), "red")


def encoded() -> bytes:
    file = io.BytesIO()
    RED.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    RED.save(tmp_path / "a.png")
    return tmp_path


def write(folder: Path, *rows: Row) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# A key that names or holds an image and is not read.


@pytest.mark.parametrize(
    "key",
    [
        "img",
        "Image",
        "IMAGES",
        "image_path",
        "image_url",
        "imagePath",
        "file_name",
        "picture",
        "photo",
        "photos",
        "pics",
    ],
)
@pytest.mark.parametrize("words", [TEXT, LLAVA])
def test_a_name_under_another_key_is_refused(folder: Path, key: str, words: Row) -> None:
    row = {**words, key: "a.png"}
    with pytest.raises(SampleError, match=f"row 0.*: the row has no 'image', but '{key}', which is not read"):
        data.load([row], folder)[0]
    report = data.check_dataset(write(folder, row))
    assert [problem.row for problem in report.problems] == [0] and report.unread == {f"'{key}'": 1}
    question = {"question": "What?", "answer": "red", key: "a.png"}
    with pytest.raises(SampleError, match=f"but '{key}', which is not read"):
        read_own_data(write(folder, question), "exact")


@pytest.mark.parametrize("value", [RED, [RED], {"bytes": b"x", "path": None}])
def test_an_image_under_any_other_key_is_refused(processor: FastVLMProcessor, value: Any) -> None:
    with pytest.raises(SampleError, match="but 'input', which is not read"):
        data.load([{**TEXT, "input": value}])[0]
    with pytest.raises(SampleError, match="sample 0 of the batch: the row has no 'image', but 'input'"):
        FastVLMDataCollator(processor)([{**TEXT, "input": value}])


@pytest.mark.parametrize(
    "extra",
    [{"image_path": None}, {"image_url": ""}, {"images": []}, {"image": float("nan")}, {"width": 5}, {"pictures": []}],
)
def test_what_names_no_image_is_left_alone(folder: Path, extra: Row) -> None:
    assert data.load([{**TEXT, **extra}], folder)[0]["images"] == []
    shown = {**SHOWN, "image": "a.png", "image_url": "https://example.com/a.png", "file_name": "x"}
    assert len(data.load([shown], folder)[0]["images"]) == 1


def test_the_collator_takes_the_image_of_a_sample(processor: FastVLMProcessor) -> None:
    collator = FastVLMDataCollator(processor)
    one, several = collator([{**SHOWN, "image": RED}]), collator([{**SHOWN, "images": [RED]}])
    assert one["pixel_values"].equal(several["pixel_values"]) and one["labels"].equal(several["labels"])
    parts = [{"role": "user", "content": [{"type": "image", "image": RED}]}, SHOWN["messages"][1]]
    with pytest.raises(SampleError, match="names images in more than one place"):
        collator([{"messages": parts, "images": [RED]}])
    with pytest.raises(SampleError, match="the row has 'video'"):
        collator([{**TEXT, "video": "a.mp4"}])


# The system message beside the turns


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_message_beside_the_turns(key: str, processor: FastVLMProcessor) -> None:
    words = [TEXT, LLAVA, {"messages": [{"role": "system", "content": "In French."}, *TEXT["messages"]]}]
    for row in words:
        loaded = data.load([{**row, key: "In French."}])
        assert loaded[0]["messages"][0] == loaded.messages(0)[0] == {"role": "system", "content": "In French."}
        assert len(loaded[0]["messages"]) == 3
    batch = FastVLMDataCollator(processor)([{**TEXT, key: "In French."}])
    assert "In French." in processor.decode(batch["input_ids"][0])
    assert "helpful" not in processor.decode(batch["input_ids"][0])
    assert len(data.load([{**TEXT, key: ""}, {**TEXT, key: None}])[0]["messages"]) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**words_of, "system": value}, message)
        for words_of, value, message in (
            (TEXT, 7, "'system' is 7; expected the text"),
            (TEXT, ["x"], r"'system' is \['x'\]; expected the text"),
            ({**TEXT, "system_prompt": "a"}, "b", "has both 'system' and 'system_prompt'"),
            (
                {"messages": [{"role": "system", "content": "a"}, *TEXT["messages"]]},
                "b",
                "a system message in its turns and a different one",
            ),
        )
    ],
)
def test_system_messages_that_cannot_be_used(row: Row, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        data.load([row])[0]


def test_developer_is_system() -> None:
    row = {"messages": [{"role": "developer", "content": "Be brief."}, *TEXT["messages"]]}
    assert data.load([row])[0]["messages"][0]["role"] == "system"


# Evaluation


@pytest.mark.parametrize(
    ("row", "images"),
    [
        ({"image": "a.png", "images": None}, 1),
        ({"image": None, "images": ["a.png", "a.png"]}, 2),
        ({"image": None, "images": None}, 0),
        ({"image": "a.png", "images": []}, 1),
        ({"image": {"bytes": base64.b64encode(encoded()).decode(), "path": None}}, 1),
    ],
)
def test_two_columns_of_one_schema(folder: Path, row: Row, images: int) -> None:
    found = read_own_data(write(folder, {"question": "Colour?", "answer": "red", **row}), "exact")
    assert [image.getpixel((0, 0)) for image in found.open_images(0)] == [(255, 0, 0)] * images


def test_no_answer_is_not_the_answer_nan(folder: Path) -> None:
    with pytest.raises(SampleError, match="the answer is nan"):
        read_own_data(write(folder, {"question": "Colour?", "answer": float("nan")}), "exact")


# One bad row costs itself


GOOD = {**SHOWN, "image": "a.png"}
LONG = "A" * 400_000
BAD: list[tuple[Any, str]] = [
    ({**SHOWN, "image": {"bytes": "no base64!", "path": None}}, "text as its bytes that is not base64"),
    ({**SHOWN, "image": {"bytes": 5, "path": None}}, "has a int as its bytes"),
    ({**SHOWN, "image": {"bytes": "", "path": None}}, r"is empty \(0 bytes\)"),
    ({**SHOWN, "image": LONG}, "does not exist: expected a file at"),
    ({**SHOWN, "image": "a/" * 90_000}, "does not exist|is a folder"),
    ({**SHOWN, "images": 5}, r"an image is 5 \(int\)"),
    ({**SHOWN, "images": [["a.png"]]}, "an image is"),
    ({**SHOWN, "image": {"bytes": None, "path": LONG}}, "does not exist"),
    ({**GOOD, "messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
    ({**GOOD, "messages": [{"role": {"a": LONG}, "content": "x"}]}, "unknown role"),
    ({**GOOD, "messages": LONG}, "expected a list with at least one question"),
    ({"k" * 5000: 1}, "has neither; its keys are 'kkk"),
    ({**{f"key {number}": 1 for number in range(5000)}, "image": "a.png"}, r"its keys are 'key 0', .*\.\.\.\."),
    ({**GOOD, "id": "x" * 5000, "messages": 5}, "expected a list with at least one question"),
    ({**GOOD, "messages": [{"role": "user", "content": [{"type": "image", "index": "x"}]}]}, "numbers its images"),
    ({**GOOD, "messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "A part of a message"),
    ({**GOOD, "messages": [{"role": "user", "content": 5}, SHOWN["messages"][1]]}, "has the content 5"),
    ({**TEXT, "messages": [{"role": "user", "content": " "}, SHOWN["messages"][1]]}, "question 0 .* is empty"),
    ('{"image": "a.png", "image": "b.png"}', "has the key 'image' twice; keep one"),
    ('{"image": "a.png", "messages": [{"role": "user", "role": "user"}]}', "has the key 'role' twice"),
    ('{"id": ' + "1" * 5000 + "}", "a number with more digits than Python reads"),
]
# In a list such a row has no end that can be found.
NESTED = ('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply")


@pytest.mark.parametrize(
    ("row", "message", "form"), [(*bad, form) for bad in BAD for form in ("lines", "list")] + [(*NESTED, "lines")]
)
def test_a_bad_row_costs_itself(folder: Path, row: Any, message: str, form: str) -> None:
    texts = [json.dumps(GOOD), row if isinstance(row, str) else json.dumps(row), json.dumps(GOOD)]
    file = folder / "rows.json"
    file.write_text("\n".join(texts) + "\n" if form == "lines" else f"[{','.join(texts)}]")
    report = data.check_dataset(file)
    assert (report.checked, [problem.row for problem in report.problems]) == (3, [1])
    text = str(report.problems[0])
    assert len(text) < 600
    loaded = data.load(file)
    assert loaded[0]["images"] and loaded[2]["images"]
    with pytest.raises(SampleError, match=message) as caught:
        loaded[1]
    assert len(str(caught.value)) < 600
    kept = data.load(file, on_bad_image="skip")
    assert len(kept) + len(kept.skipped) == 3


def test_base64_in_json_is_bytes(folder: Path) -> None:
    row = {**SHOWN, "image": {"bytes": base64.encodebytes(encoded()).decode(), "path": None}}
    assert data.load(write(folder, row))[0]["images"][0].getpixel((0, 0)) == (255, 0, 0)


def test_whatever_a_row_raises_it_is_one_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, source: Any) -> Any:
        raise ZeroDivisionError("of a decoder")

    monkeypatch.setattr("transformers_fastvlm.data.image_files.ImageFolder.size_of", fails)
    report = data.check_dataset(write(folder, GOOD, TEXT, GOOD))
    assert [(problem.row, problem.message) for problem in report.problems] == [
        (0, "ZeroDivisionError: of a decoder"),
        (2, "ZeroDivisionError: of a decoder"),
    ]


def test_unread_keys_are_counted(folder: Path) -> None:
    rows = [{**GOOD, "source": "web", "score": 1}, {**GOOD, "source": "web"}, {**GOOD, "source": None}]
    report = data.check_dataset(write(folder, *rows))
    assert report.ok and report.unread == {"'source'": 2, "'score'": 1}
    many = [{**TEXT, f"key {number}": 1} for number in range(150)]
    assert len(data.check_dataset(write(folder, *many)).unread) == 100
