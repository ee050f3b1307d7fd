# SPDX-License-Identifier: Apache-2.0
"""`<image>` in a question is the place of an image in every tool, or an error; it is never an image too many."""

from typing import Any

import pytest
from PIL import Image

from transformers_fastvlm.engines.prompts import place_images
from transformers_fastvlm.evaluation.lmms_model import _content

IMAGES = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))]


def shown(parts: list[dict[str, Any]]) -> list[Any]:
    return [part["image"].width - 8 if part["type"] == "image" else part["text"] for part in parts]


@pytest.mark.parametrize(
    ("text", "number", "expected", "in_eval"),
    [
        ("Which?", 0, ["Which?"], ["Which?"]),
        ("Which?", 1, [0, "Which?"], [0, "Which?"]),
        ("<image>\nWhich?", 1, [0, "\nWhich?"], [0, "\nWhich?"]),
        ("In <image>, what?", 1, ["In ", 0, ", what?"], ["In ", 0, ", what?"]),
        ("<image> or <image>?", 2, [0, " or ", 1, "?"], [0, " or ", 1, "?"]),
        ("What is <image>?", 0, "has 1 <image>, but there are 0 images", ["What is < image >?"]),
        ("<image><image>", 1, "has 2 <image>, but there is 1 image. Write", [0, "< image >< image >"]),
        ("<image>?", 2, "has 1 <image>, but there are 2 images", [0, 1, "< image >?"]),
    ],
)
def test_one_rule(text: str, number: int, expected: Any, in_eval: list[Any]) -> None:
    images = IMAGES[:number]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            place_images(text, images)
    else:
        assert shown(place_images(text, images)) == expected
    parts = [*({"type": "image", "url": image} for image in images), {"type": "text", "text": text}]
    assert shown(_content(parts, "task t, row 0")) == in_eval
