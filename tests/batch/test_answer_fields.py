# SPDX-License-Identifier: Apache-2.0
"""Answers that follow a JSON schema become columns."""

import json
from pathlib import Path
from typing import Any

import pytest

from transformers_fastvlm.batch import COLUMNS
from transformers_fastvlm.batch.answer_fields import field_types, with_fields
from transformers_fastvlm.batch.outputs import write_rows
from transformers_fastvlm.engines import Schema

FORM = Schema.json(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "colour": {"enum": ["red", "blue"]},
            "count": {"type": ["integer", "null"]},
            "size": {"type": "number"},
            "seen": {"const": True},
            "tags": {"type": "array", "items": {"type": "string"}},
            "mixed": {"enum": ["a", 1]},
            "source": {"type": "string"},
            "any": True,
        },
    }
)


def row(answer: str | None, reason: str | None = "stop", error: str | None = None) -> dict[str, Any]:
    values = dict.fromkeys(COLUMNS) | {"answer": answer, "finish_reason": reason, "error": error}
    return values | {"source": "a.png", "completion_tokens": 7}


def test_types_of_fields() -> None:
    assert field_types(FORM) == {
        "name": "string",
        "colour": "string",
        "count": "integer",
        "size": "number",
        "seen": "boolean",
        "tags": "json",
        "mixed": "json",
        "source": "string",
        "any": "json",
    }
    for none in (None, Schema.choices(["a"]), Schema.json_object()):
        assert field_types(none) == {}


def test_fields_of_rows() -> None:
    good = with_fields(row('{"name": "x", "count": 3}'), FORM)
    assert good == row('{"name": "x", "count": 3}') | {"fields": {"name": "x", "count": 3}}
    assert with_fields(row("[1]"), Schema.json({"type": "array"}))["fields"] is None
    assert with_fields(row("red"), Schema.choices(["red"])) == row("red")
    failed = row(None, None, "there is no image.")
    assert with_fields(failed, FORM) == failed | {"fields": None}


@pytest.mark.parametrize(
    ("answer", "reason", "said"),
    [
        ('{"name": "x', "length", "the answer was cut after 7 tokens, before it was complete."),
        (
            '{"size": 1e999}',
            "stop",
            "the answer cannot be stored as a table row: the number 1e999 does not fit into 64 bits.",
        ),
        (f'{{"count": {2**63}}}', "stop", f"the number {2**63} does not fit into 64 bits."),
    ],
)
def test_no_half_answer_is_passed_on(answer: str, reason: str, said: str) -> None:
    found = with_fields(row(answer, reason), FORM)
    assert found["answer"] is None and found["fields"] is None and said in found["error"]


def test_half_a_text_of_a_pattern_is_an_error_too() -> None:
    found = with_fields(row("12", "length"), Schema.regex("[0-9]{4}"))
    assert found["answer"] is None and "cut after 7 tokens" in found["error"] and "fields" not in found


def test_columns_of_parquet(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow, of the extra batch")
    answers = [
        '{"name": "x", "colour": "red", "count": 3, "size": 2, "seen": true, "tags": ["a", "ü"], "mixed": 1}',
        '{"name": "y", "count": null, "source": "mine", "other": 1}',
    ]
    rows = [with_fields(row(answer), FORM) for answer in answers]
    rows.append(with_fields(row(None, None, "there is no image."), FORM))
    write_rows(tmp_path / "out.parquet", rows, None, field_types(FORM))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == [*COLUMNS, *(f"fields.{name}" for name in field_types(FORM))]
    kinds = {field.name: str(field.type) for field in table.schema}
    assert [kinds[f"fields.{name}"] for name in ("name", "count", "size", "seen", "tags")] == [
        "string", "int64", "double", "bool", "string",
    ]  # fmt: skip
    first, second, third = table.to_pylist()
    assert (first["fields.size"], first["fields.tags"], first["fields.mixed"]) == (2.0, '["a", "ü"]', "1")
    assert (second["source"], second["fields.source"], second["fields.count"]) == ("a.png", "mine", None)
    assert {third[f"fields.{name}"] for name in field_types(FORM)} == {None}


def test_an_object_in_jsonl(tmp_path: Path) -> None:
    write_rows(tmp_path / "out.jsonl", [with_fields(row('{"tags": ["a"]}'), FORM)], None, field_types(FORM))
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == [*COLUMNS, "fields"] and json.loads(line)["fields"] == {"tags": ["a"]}
