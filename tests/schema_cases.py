# SPDX-License-Identifier: Apache-2.0
"""Five schemas, and for each whether an answer fits it, checked by hand."""

import json
import re
from collections.abc import Callable
from typing import Any

from transformers_fastvlm.engines import Schema

CHOICES = ["red", "green", "dark green", 'blue "or" \\ so', "größer"]
PATTERN = r"[A-Z]{2}-[0-9]{1,4}( \(old\))?"


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


COLOUR = _object(
    colour={"enum": ["red", "green", "blue"]},
    count={"type": "integer", "minimum": 0, "maximum": 99},
    note={"type": "string", "maxLength": 12},
)
LIST = {
    "type": "array",
    "minItems": 1,
    "maxItems": 3,
    "items": _object(name={"type": "string", "minLength": 1, "maxLength": 6}, seen={"type": "boolean"}),
}
NESTED = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 8},
        "box": {**_object(x={"type": "integer", "minimum": -9, "maximum": 9}), "required": []},
        "tag": {"anyOf": [{"type": "null"}, {"enum": ["a", "b"]}]},
    },
    "required": ["title"],
    "additionalProperties": False,
}


def _is_text(value: Any, longest: int, shortest: int = 0) -> bool:
    return isinstance(value, str) and shortest <= len(value) <= longest


def _fits_colour(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["colour", "count", "note"]
        and value["colour"] in ("red", "green", "blue")
        and type(value["count"]) is int
        and 0 <= value["count"] <= 99
        and _is_text(value["note"], 12)
    )


def _fits_list(text: str) -> bool:
    value = json.loads(text)
    return 1 <= len(value) <= 3 and all(
        list(one) == ["name", "seen"] and _is_text(one["name"], 6, 1) and isinstance(one["seen"], bool) for one in value
    )


def _fits_nested(text: str) -> bool:
    value = json.loads(text)
    box = value.get("box", {})
    return (
        value.keys() <= {"title", "box", "tag"}
        and _is_text(value["title"], 8)
        and box.keys() <= {"x"}
        and type(box.get("x", 0)) is int
        and -9 <= box.get("x", 0) <= 9
        and value.get("tag") in (None, "a", "b")
    )


SCHEMAS: dict[str, tuple[Schema, Callable[[str], bool]]] = {
    "object": (Schema.json(COLOUR), _fits_colour),
    "list": (Schema.json(LIST), _fits_list),
    "nested": (Schema.json(NESTED), _fits_nested),
    "choices": (Schema.choices(CHOICES), CHOICES.__contains__),
    "regex": (Schema.regex(PATTERN), lambda text: re.fullmatch(PATTERN, text) is not None),
}
