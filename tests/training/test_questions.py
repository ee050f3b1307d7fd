# SPDX-License-Identifier: Apache-2.0
"""Captions as answers to generic questions, the data of stage 1.5."""

from pathlib import Path
from typing import Any

import pytest

from transformers_fastvlm.training.questions import AskedCaptions, ask, load_questions

ROWS = [
    {
        "id": str(number),
        "images": ["picture"],
        "messages": [
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "assistant", "content": f"A caption, number {number}."},
        ],
    }
    for number in range(400)
]


def test_each_caption_answers_a_drawn_question_with_the_image_before_or_after() -> None:
    questions = load_questions("generic")
    asked = AskedCaptions(ROWS, questions)
    before = 0
    used = set()
    for row, original in zip((asked[index] for index in range(len(asked))), ROWS, strict=True):
        user, assistant = row["messages"]
        assert assistant == original["messages"][1] and row["images"] == ["picture"] and row["id"] == original["id"]
        before += user["content"].startswith("<image>\n")
        question = user["content"].replace("<image>", "").strip()
        assert user["content"] in (f"<image>\n{question}", f"{question}\n<image>")
        used.add(question)
    assert used <= set(questions) and len(used) > 0.9 * len(questions) and len(questions) >= 40
    assert 160 < before < 240  # of 400, with p = 0.5: four standard deviations


def test_the_same_row_gets_the_same_question_in_any_order_and_epoch() -> None:
    questions = load_questions("generic")
    asked = AskedCaptions(ROWS, questions)
    assert [asked[index] for index in reversed(range(400))][::-1] == [asked[index] for index in range(400)]
    assert [AskedCaptions(ROWS, questions, seed=1)[i] for i in range(9)] != [asked[i] for i in range(9)]


def test_rows_of_a_stream_get_the_same_questions() -> None:
    datasets = pytest.importorskip("datasets", reason="streams are read by the package datasets")
    questions = load_questions("generic")
    stream = datasets.IterableDataset.from_generator(ROWS.__iter__)
    asked = AskedCaptions(ROWS, questions)
    assert list(stream.map(ask, fn_kwargs={"questions": questions})) == [asked[index] for index in range(400)]


def test_questions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "questions.txt"
    file.write_text("What?\n\n  Where is it?  \n")
    assert load_questions(str(file)) == ["What?", "Where is it?"]
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no questions; expected one per line"):
        load_questions(str(file))
    file.write_text("What is in <image>?")
    with pytest.raises(ValueError, match="leave <image> out, it is added for you"):
        load_questions(str(file))
    with pytest.raises(FileNotFoundError):
        load_questions(str(tmp_path / "none.txt"))


@pytest.mark.parametrize("row", [{"images": []}, {"images": ["a", "b"]}, {"messages": ROWS[0]["messages"][:1]}])
def test_rows_that_are_no_captions_are_refused(row: dict[str, Any]) -> None:
    dataset = AskedCaptions([{**ROWS[0], "place": "captions.json, row 7", **row}], ["What?"])
    with pytest.raises(ValueError, match=r"captions.json, row 7 has .* needs one image and its caption"):
        dataset[0]
