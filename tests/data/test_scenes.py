# SPDX-License-Identifier: Apache-2.0
"""Scenes follow from their numbers, and what is asked about them has the answer that the image shows."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from transformers_fastvlm.data.scenes import COLORS, KINDS, SHAPES, Scene, SceneDataset, make_collage, make_scene
from transformers_fastvlm.data.scenes.content import WORDS
from transformers_fastvlm.data.scenes.drawing import DIGIT_FACES, FACES, Canvas
from transformers_fastvlm.data.scenes.tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(5, index) for index in range(150)]


def test_a_scene_follows_from_its_numbers() -> None:
    first, again, other = make_scene(1, 7), make_scene(1, 7), make_scene(2, 7)
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.caption, first.questions) == (again.caption, again.questions)
    assert (first.caption, first.image.size) != (other.caption, other.image.size)


@pytest.mark.parametrize("kind", KINDS)
def test_every_scene_of_a_kind_can_be_asked_about(kind: str) -> None:
    for index in range(25):
        scene = make_scene(3, index, (kind,))
        assert scene.kind == kind and scene.questions
        assert {question.kind for question in scene.questions} == {kind}


def test_all_kinds_sizes_and_answers_occur(scenes: list[Scene]) -> None:
    assert {scene.kind for scene in scenes} == set(KINDS)
    ratios = [scene.image.width / scene.image.height for scene in scenes]
    assert min(ratios) < 0.65 and max(ratios) > 1.5 and sum(ratio == 1 for ratio in ratios) > 30
    assert all(0.49 < ratio < 2.05 for ratio in ratios)
    assert len({scene.image.size for scene in scenes}) > 100
    answers = {kind: {q.answer for scene in scenes for q in scene.questions if q.kind == kind} for kind in KINDS}
    names = {f"{color} {shape}" for color in COLORS for shape in SHAPES}
    assert {*COLORS, *SHAPES} < answers["attribute"] <= {*COLORS, *SHAPES, *names}
    assert {"left", "right", "above", "below"} < answers["relation"]
    assert answers["count"] == set("012345")
    assert all(re.fullmatch("[1-9][0-9]{1,2}", answer) for answer in answers["number"])
    assert answers["word"] <= set(WORDS)


def listed(caption: str) -> list[tuple[str, str, str, str]]:
    """Return row, column, color and shape of every object of a caption."""
    return re.findall(r"(top|middle|bottom) (left|center|right) (\w+) (\w+)[,.]", caption)


def test_counts_are_those_of_the_caption(scenes: list[Scene]) -> None:
    checked = 0
    for scene in scenes:
        if scene.kind != "count":
            continue
        objects = listed(scene.caption)
        assert scene.caption.endswith(f" {len(objects)} in all.")
        for question in scene.questions:
            named = set(re.findall(r"\w+", question.text.lower()))
            count = sum(
                not (named & set(COLORS) and color not in named)
                and not ({f"{one}s" for one in SHAPES} & named and f"{shape}s" not in named)
                for _, _, color, shape in objects
            )
            assert question.answer == str(count), (scene.caption, question)
            checked += 1
    assert checked > 50


def test_relations_and_names_are_those_of_the_places_in_the_caption(scenes: list[Scene]) -> None:
    """A caption names a third of the image's height and width for each object; across thirds the order is certain."""
    order = {"top": 0, "middle": 1, "bottom": 2, "left": 0, "center": 1, "right": 2}
    relations = named = 0
    for scene in scenes:
        if scene.kind not in ("attribute", "relation"):
            continue
        objects = listed(scene.caption)
        places = {f"{color} {shape}": (order[row], order[column]) for row, column, color, shape in objects}
        for question in scene.questions:
            if match := re.search(r" at the (\w+ \w+)\?", question.text):
                there = [f"{color} {shape}" for row, column, color, shape in objects if f"{row} {column}" == match[1]]
                assert there == [question.answer]
                named += 1
            match = re.search(r" (left of|right of|above|below) the (\w+ \w+)\?", question.text)
            if question.kind != "relation" or match is None or question.text.startswith("Is"):
                continue
            relation, name = match.groups()
            axis = 1 if relation in ("left of", "right of") else 0
            sign = -1 if relation in ("left of", "above") else 1
            assert sign * (places[question.answer][axis] - places[name][axis]) >= 0, (scene.caption, question)
            relations += 1
    assert relations > 30 and named > 30


def test_objects_are_where_and_what_the_caption_says(scenes: list[Scene]) -> None:
    """Looked up in the image: the middle of the object's third has its colour somewhere near."""
    order = {"top": 0, "middle": 1, "bottom": 2, "left": 0, "center": 1, "right": 2}
    for scene in scenes:
        array = np.asarray(scene.image, np.int16)
        height, width = array.shape[:2]
        for row, column, color, _ in listed(scene.caption):
            top, left = order[row] * height // 3, order[column] * width // 3
            part = array[top : top + height // 3 + 1, left : left + width // 3 + 1]
            close = np.abs(part - np.array(COLORS[color], np.int16)).max(axis=-1) < 45
            assert close.sum() > 0.0015 * height * width, (scene.caption, color)


def test_single_characters_are_those_of_the_text() -> None:
    asked = set()
    for index in range(40):
        scene = make_scene(8, index, ("number", "word", "character"))
        texts = {"digit": "", "letter": ""} | {
            "digit" if question.kind == "number" else "letter": question.answer
            for question in scene.questions
            if question.kind in ("number", "word")
        }
        for question in scene.questions:
            if question.kind != "character":
                continue
            words = question.text.rstrip("?").split()
            text = texts[next(word.rstrip("s") for word in words if word.rstrip("s") in texts)]
            place = next((word for word in words if word in ("first", "second", "third", "last")), None)
            index_of = {"first": 0, "second": 1, "third": 2, "last": -1}
            expected = str(len(text)) if place is None else text[index_of[place]]
            assert question.answer == expected, (texts, question)
            asked.add(place)
    assert asked == {"first", "second", "third", "last", None}


def test_bars_are_as_high_as_the_answers_say() -> None:
    """Measured in the image: the share of the middle of the bar's column that has its colour."""
    checked = 0
    for index in range(25):
        scene = make_scene(9, index, ("chart",))
        values = dict(re.findall(r"(\w+) (\d)", scene.caption.partition(": ")[2]))
        array = np.asarray(scene.image, np.int16)
        heights = {}
        for name in values:
            close = (np.abs(array - np.array(COLORS[name], np.int16)).max(axis=-1) < 45).sum(axis=0)
            heights[name] = np.sort(close)[-8:].mean()
        tallest, lowest = (
            max(values, key=lambda name: int(values[name])),
            min(values, key=lambda name: int(values[name])),
        )
        if values[tallest] != values[lowest]:
            assert heights[tallest] > heights[lowest], scene.caption
            ratio = heights[tallest] / heights[lowest]
            assert ratio == pytest.approx(int(values[tallest]) / int(values[lowest]), rel=0.2), scene.caption
            checked += 1
    assert checked > 12


def test_marks_lie_on_what_they_name(scenes: list[Scene]) -> None:
    """Looked up in the image: a mark of an object or, just below it, of a bar lies on its colour."""
    checked = set()
    for scene in [*scenes, *(make_collage(5, index) for index in range(20))]:
        array = np.asarray(scene.image, np.int16)
        height, width = array.shape[:2]
        for mark in scene.marks:
            assert 0 < mark.x < 1 and 0 < mark.y < 1
            if mark.labels[0] not in COLORS:
                continue
            x, y = int(mark.x * width), int(mark.y * height)
            y += 4 if mark.labels[1].startswith("bar") else 0
            seen = np.median(array[y - 2 : y + 3, x - 2 : x + 3], axis=(0, 1))
            assert np.abs(seen - np.array(COLORS[mark.labels[0]])).max() < 45, (scene.caption, mark)
            checked.add(mark.labels[1])
    assert checked == {*SHAPES, *(f"bar {value}" for value in range(1, 7))}


def test_marks_tell_what_the_caption_tells(scenes: list[Scene]) -> None:
    for scene in scenes:
        if scene.kind in ("number", "word", "character"):
            lines: dict[float, str] = {}
            for mark in sorted(scene.marks, key=lambda mark: (mark.y, mark.x)):
                lines[mark.y] = lines.get(mark.y, "") + mark.labels[0]
            assert list(lines.values()) == re.findall(r"(?:number|word) (\w+)", scene.caption)
        elif scene.kind == "chart":
            told = re.findall(r"(\w+) (\d)", scene.caption.partition(": ")[2])
            assert [mark.labels for mark in scene.marks] == [(color, f"bar {value}") for color, value in told]
        else:
            told = [(color, shape, row, column) for row, column, color, shape in listed(scene.caption)]
            assert [mark.labels for mark in scene.marks] == told


def test_letters_are_marked_at_their_ink() -> None:
    """To within the white beside a letter, which its share of the line has and its ink has not."""
    canvas = Canvas(256, 128, 512, (255, 255, 255))
    middles = canvas.text("IWI", 128, 64, 160, 60, "sans", (0, 0, 0))
    ink = (np.asarray(canvas.image.convert("L")) < 128).any(axis=0)
    edges = np.flatnonzero(np.diff(ink.astype(int)))
    assert len(edges) == 6
    assert middles == pytest.approx([(edges[i] + edges[i + 1]) / 4 for i in (0, 2, 4)], abs=8)


def test_collages_are_crowded_and_follow_from_their_numbers() -> None:
    first, again = make_collage(1, 7), make_collage(1, 7)
    assert first.image.tobytes() == again.image.tobytes() and first.marks == again.marks
    assert make_collage(2, 7).marks != first.marks
    collages = [make_collage(1, index) for index in range(40)]
    assert sum(len(collage.marks) for collage in collages) > 40 * 8
    letters = {mark.labels[0] for collage in collages for mark in collage.marks if len(mark.labels) == 1}
    assert letters == {*"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"}
    with pytest.raises(ValueError, match="aspect is 'wide'"):
        make_collage(1, 0, "wide")


@pytest.mark.parametrize("face", DIGIT_FACES)
def test_text_is_drawn_inside_its_box(face: str) -> None:
    canvas = Canvas(256, 128, 512, (255, 255, 255))
    canvas.text("4071" if face == "segments" else "ZEBRA", 128, 64, 160, 60, face, (0, 0, 0))
    ink = np.asarray(canvas.image.convert("L")) < 128
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    assert 96 - 2 <= columns[0] and columns[-1] <= 416 + 2
    assert 68 - 2 <= rows[0] and rows[-1] <= 188 + 2
    assert columns[-1] - columns[0] > 300 or rows[-1] - rows[0] > 110


def test_faces_differ() -> None:
    drawn = set()
    for face in FACES:
        canvas = Canvas(256, 256, 256, (255, 255, 255))
        canvas.text("LAMP", 128, 128, 200, 80, face, (0, 0, 0))
        drawn.add(canvas.image.tobytes())
    assert len(drawn) == len(FACES)


@pytest.mark.parametrize("task", ["captions", "conversations", "questions"])
def test_rows(task: str) -> None:
    scenes = SceneDataset(20, seed=4, task=task, max_turns=3)  # type: ignore[arg-type]
    assert len(scenes) == 20
    for index in range(20):
        row = scenes[index]
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert row["messages"][0]["content"].startswith("<image>\n")
        assert sum(message["content"].count("<image>") for message in row["messages"]) == len(row["images"]) == 1
        assert isinstance(row["images"][0], Image.Image)
        assert len(roles) <= (8 if task == "conversations" else 2)
        assert ("kind" in row) == (task == "questions")
    assert pickle.loads(pickle.dumps(scenes))[3]["messages"] == scenes[3]["messages"]
    assert SceneDataset(5, seed=4, task=task, max_turns=3, start=10)[2]["id"] == scenes[12]["id"]  # type: ignore[arg-type]
    for index in (-1, 20):
        with pytest.raises(IndexError, match="rows 0 to 19"):
            scenes[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"length": 3, "start": -1}, "start -1"),
        ({"length": 3, "task": "answers"}, "task is 'answers'; expected 'captions'"),
        ({"length": 3, "kinds": ("colour",)}, r"kinds is \('colour',\); expected one or more of"),
        ({"length": 3, "kinds": ()}, "expected one or more of"),
        ({"length": 3, "aspect": "wide"}, "aspect is 'wide'; expected 'any', 'square' or 'oblong'"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SceneDataset(**arguments)


def test_tokenizer(tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "Qwen2Tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == size <= 480 + 3
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    for text in ("What is left of the red circle?", "Text: the number 4071, the word ZEBRA.", "Grüße, 世界!\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # Reading is letter by letter and digit by digit.
    assert tokenizer.tokenize("4071") == list("4071") and tokenizer.tokenize("ZEBRA") == list("ZEBRA")
    assert len(tokenizer.tokenize("Which shape is left of the red circle?")) == 9
    again = tmp_path / "again"
    write_tokenizer(again)
    assert (again / "merges.txt").read_bytes() == (tmp_path / "merges.txt").read_bytes()
