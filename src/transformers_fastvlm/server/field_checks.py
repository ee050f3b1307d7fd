# SPDX-License-Identifier: Apache-2.0
"""Checks of single fields of a request, with errors that name the field, its value and what was expected."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .api_errors import ApiError

__all__ = [
    "IGNORED",
    "TAKEN",
    "Refused",
    "missing",
    "number",
    "refuse_others",
    "shown",
    "take",
    "unsupported",
    "whole",
    "wrong",
]

TAKEN = "taken"
IGNORED = "ignored"
"""Marks a field that is accepted and has no effect: no value of it would change the answer."""

_KINDS = {str: "a text", list: "a list", dict: "an object", bool: "true or false", int: "a whole number"}


@dataclass(frozen=True)
class Refused:
    """A field that is refused.

    Args:
        why: what the server does instead, such as "calls no tools".
        neutral: values without effect, which are accepted, as null is.
    """

    why: str
    neutral: tuple[Any, ...] = ()


def refuse_others(body: Mapping[str, Any], fields: Mapping[str, str | Refused], prefix: str = "") -> None:
    """Raise ApiError for the first field that is refused or unknown, unless its value has no effect.

    Args:
        body: the object to check.
        fields: TAKEN, IGNORED or Refused, by name.
        prefix: of the names in errors, such as "stream_options.".
    """
    for key, value in body.items():
        support = fields.get(key)
        if value is None or isinstance(support, str):
            continue
        if support is None:
            raise unsupported(prefix + key)
        if not any(value == neutral for neutral in support.neutral):
            raise unsupported(prefix + key, support.why)


def unsupported(param: str, why: str = "") -> ApiError:
    """Return the error for a field that is not supported; `why` is a clause about the server."""
    name, reason = param[:100], f": it {why}" if why else ""
    message = f"{name} is not supported by this server{reason}; leave it out."
    return ApiError(400, message, param=name, code="unsupported_parameter")


def missing(param: str) -> ApiError:
    """Return the error for a field that is required."""
    return ApiError(400, f"{param} is missing.", param=param, code="missing_required_parameter")


def wrong(param: str, value: Any, expected: str) -> ApiError:
    """Return the error for a value that is not the expected one."""
    return ApiError(400, f"{param} is {shown(value)}; expected {expected}.", param=param, code="invalid_value")


def take(body: Mapping[str, Any], key: str, kind: type, prefix: str = "") -> Any:
    """Return a field, or None if it is null or missing."""
    value = body.get(key)
    # bool is a kind of int in Python.
    if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise wrong(prefix + key, value, _KINDS[kind])
    return value


def whole(body: Mapping[str, Any], key: str, low: int, high: int) -> int | None:
    """Return a field that is a whole number from `low` to `high`, or None if it is null or missing."""
    value: int | None = take(body, key, int)
    if value is not None and not low <= value <= high:
        raise wrong(key, value, f"{low} to {high}")
    return value


def number(body: Mapping[str, Any], key: str, default: float, low: float, high: float, prefix: str = "") -> float:
    """Return a field that is a number from `low` to `high`, or the default if it is null or missing."""
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise wrong(prefix + key, value, f"a number from {low:g} to {high:g}")
    return float(value)


def shown(value: Any) -> str:
    """Return the beginning of a value, short enough for a message."""
    if isinstance(value, str):
        text = repr(value[:80])
    else:
        text = ""
        for piece in json.JSONEncoder(default=str).iterencode(value):
            text += piece[:81]
            if len(text) > 80:
                break
    return text if len(text) <= 80 else f"{text[:77]}..."
