# SPDX-License-Identifier: Apache-2.0
"""JSON of a request's body, within bounds that hold before it is parsed."""

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from .api_errors import ApiError
from .field_checks import shown

__all__ = ["parse_json"]

MAX_MARKS = 20_000
"""Maximum number of the characters `[`, `{`, `,` and `:` in a body: one per JSON value; base64 has none of them."""

MAX_DEPTH = 32
"""Maximum nesting of lists and objects in a body; a request needs six levels."""

MAX_DIGITS = 100
"""Maximum characters of a number in a body."""


def parse_json(body: bytes) -> Any:
    """Return the JSON value of a body.

    Python's parser holds the interpreter lock for the whole body, so slow input is refused first.

    Raises:
        ApiError: 413, more values than a request needs; 400, invalid or unaccepted JSON.
    """
    marks = sum(body.count(mark) for mark in (b"[", b"{", b",", b":"))
    if marks > MAX_MARKS:
        raise ApiError(
            413,
            f"The body has {marks} of the characters [ {{ , and : together; this server accepts {MAX_MARKS}. "
            "Send fewer messages, parts and fields.",
            code="request_too_large",
        )
    try:
        # Some editors write a byte order mark, which is not part of the text.
        found = json.loads(
            body.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_int=_number_of(int),
            parse_float=_number_of(float),
            parse_constant=_no_number,
        )
    except UnicodeDecodeError as error:
        raise ApiError(400, "The body is not UTF-8; expected JSON in UTF-8.", code="invalid_json") from error
    except RecursionError as error:
        raise _too_deep() from error
    except json.JSONDecodeError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from error
    except ValueError as error:
        raise ApiError(400, f"The body is not a request: {error}", code="invalid_json") from error
    if _depth(found) > MAX_DEPTH:
        raise _too_deep()
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {shown(twice)} twice; give it once.")
    return found


def _number_of(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser for numbers of a kind."""

    def read(text: str) -> Any:
        if len(text) > MAX_DIGITS:
            message = f"it has a number of {len(text)} characters; this server accepts up to {MAX_DIGITS}."
            raise ValueError(message)
        number = kind(text)
        if not math.isfinite(number):
            raise ValueError(f"{text} is too large for a number; expected one below 1.8e308.")
        return number

    return read


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON.")


def _depth(value: Any) -> int:
    """Return the nesting depth of a value: 0 for one that is neither a list nor an object."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _too_deep() -> ApiError:
    message = f"The body's JSON is nested too deeply; this server accepts {MAX_DEPTH} levels of lists and objects."
    return ApiError(400, message, code="invalid_json")
