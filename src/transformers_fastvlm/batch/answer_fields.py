# SPDX-License-Identifier: Apache-2.0
"""Fields of answers that follow a JSON schema: their values, and the types of their columns."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from ..engines.answer_schema import Schema

__all__ = ["FIELDS", "FieldType", "column_values", "field_types", "with_fields"]

FIELDS = "fields"
"""Key of an answer's object in a row; in Parquet, the columns `fields.NAME`."""

FieldType = Literal["string", "integer", "number", "boolean", "json"]

_TYPE_OF: dict[type, FieldType] = {str: "string", bool: "boolean", int: "integer", float: "number"}

_SIMPLE: dict[str, FieldType] = {kind: kind for kind in _TYPE_OF.values()}


def field_types(schema: Schema | None) -> dict[str, FieldType]:
    """Return the type of each field of the object that a JSON schema describes; "json" for all that are not simple.

    Without a JSON schema, or for one that lists no properties, there are none.
    """
    properties = schema.value.get("properties") if schema is not None and schema.kind == "json" else None
    if not isinstance(properties, Mapping):
        return {}
    return {name: _type_of(field) for name, field in properties.items()}


def with_fields(row: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """Return a row with the fields of its answer, if the schema is of JSON; or with an error, if it is incomplete.

    Args:
        row: row with the columns of the output.
        schema: form of the answer.
    """
    fields = None
    if row["error"] is None and row["finish_reason"] != "stop":
        tokens = row["completion_tokens"]
        row = {**row, "answer": None, "error": f"the answer was cut after {tokens} tokens, before it was complete."}
    elif row["error"] is None and schema.kind == "json":
        try:
            value = json.loads(row["answer"], parse_int=_whole_number, parse_float=_real_number)
        except ValueError as error:
            row = {**row, "answer": None, "error": f"the answer cannot be stored as a table row: {error}"}
        else:
            fields = value if isinstance(value, dict) else None
    return {**row, FIELDS: fields} if schema.kind == "json" else row


def column_values(fields: Mapping[str, Any] | None, types: Mapping[str, FieldType]) -> dict[str, Any]:
    """Return the values of the columns `fields.NAME`."""
    found = {} if fields is None else fields
    return {f"{FIELDS}.{name}": _cell(found.get(name), kind) for name, kind in types.items()}


def _cell(value: Any, kind: FieldType) -> Any:
    if value is None:
        return None
    if kind == "json":
        return json.dumps(value, ensure_ascii=False)
    return float(value) if kind == "number" else value


def _type_of(field: Any) -> FieldType:
    if not isinstance(field, Mapping):
        return "json"
    kinds: Any = field.get("type")
    if kinds is None:
        values = [field["const"]] if "const" in field else field.get("enum") or []
        kinds = list({_TYPE_OF.get(type(value), "json") for value in values if value is not None})
    simple = {kinds} if isinstance(kinds, str) else {*kinds} - {"null"}
    return _SIMPLE.get(simple.pop(), "json") if len(simple) == 1 else "json"


def _whole_number(text: str) -> int:
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"the number {text[:40]} does not fit into 64 bits.")
    return number


def _real_number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} does not fit into 64 bits.")
    return number
