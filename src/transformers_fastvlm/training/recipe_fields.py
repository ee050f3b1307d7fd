# SPDX-License-Identifier: Apache-2.0
"""Dataclasses from the content of a YAML file, with every name and type checked."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from huggingface_hub.dataclasses import type_validator

__all__ = ["build", "check_keys", "did_you_mean"]


def build(section: type, content: Any, where: str = "") -> Any:
    """Make a dataclass, and the dataclasses nested in it, from a mapping.

    Args:
        section: a dataclass; the annotations of its fields are the allowed types.
        content: values by field name.
        where: name of the section in errors; empty for the outermost.

    Raises:
        ValueError: a name is unknown, or a value has another type.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{where or 'The recipe'} is {content!r}; expected a section with keys and values.")
    hints = typing.get_type_hints(section)
    check_keys(content, hints, where)
    values = {}
    for name, value in content.items():
        path, hint = f"{where}.{name}" if where else name, hints[name]
        nested: Any = next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)
        if nested is not None and (value is not None or type(None) not in get_args(hint)):
            values[name] = build(nested, {} if value is None else value, path)
            continue
        if hint is float or float in get_args(hint):
            value = float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        try:
            type_validator(path, value, hint)
        except TypeError as error:
            raise ValueError(f"{path} is {value!r}; expected {_described(hint)}.") from error
        values[name] = value
    return section(**values)


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_described(kind) for kind in get_args(hint))
    names = {type(None): "null", bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names.get(hint, "a list" if get_origin(hint) is list else "keys and values")


def check_keys(content: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError for the first unknown key, and suggest the key that was probably meant."""
    known = list(known)
    for key in content:
        if key not in known:
            raise ValueError(
                f"{where or 'The recipe'} has no key {key!r}{did_you_mean(str(key), known)} "
                f"Its keys are {', '.join(known)}."
            )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a sentence: a suggestion of the closest known word, or a full stop."""
    near: Sequence[str] = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
