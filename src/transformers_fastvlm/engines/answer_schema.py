# SPDX-License-Identifier: Apache-2.0
"""The form that an answer must have: a JSON schema, a regular expression, or one of several texts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["MAX_CHOICES", "MAX_SCHEMA_BYTES", "Schema"]

MAX_SCHEMA_BYTES = 64 * 1024
"""Maximum size of a schema as UTF-8 text; it may come from the network, and larger ones take long to compile."""

MAX_CHOICES = 1000

SchemaKind = Literal["json", "regex", "choices"]


@dataclass(frozen=True)
class Schema:
    """The form of an answer, enforced during generation; made by `json`, `json_object`, `regex` or `choices`.

    Attributes:
        kind: "json", "regex" or "choices".
        text: the JSON schema as JSON text, the regular expression, or the choices as a JSON list.

    Example:
        >>> Schema.choices(["yes", "no"])
        Schema(kind='choices', text='["yes", "no"]')
    """

    kind: SchemaKind
    text: str

    def __post_init__(self) -> None:
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as error:
            raise ValueError("the schema is not valid Unicode text: it has lone surrogates.") from error
        if size > MAX_SCHEMA_BYTES:
            raise ValueError(f"the schema has {size:,} bytes; expected at most {MAX_SCHEMA_BYTES:,}.")

    @classmethod
    def json(cls, schema: Mapping[str, Any] | bool | str) -> "Schema":
        """Return the form of JSON that fits a JSON schema. There is no white space between the parts.

        Args:
            schema: the schema, or its JSON text. The order of `properties` is the order of an object's fields.

        Raises:
            ValueError: not a JSON schema, one that nothing matches, or too large. The engine checks the keywords.
        """
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            value = {} if value is True else value
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise ValueError(f"the JSON schema is not JSON: {reason}.") from error
        if not isinstance(value, Mapping):
            raise ValueError(f"the JSON schema is {text[:80]}; expected an object such as {{'type': 'object'}}.")
        return cls("json", text)

    @classmethod
    def json_object(cls) -> "Schema":
        """Return the form of any JSON object."""
        return cls.json({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> "Schema":
        """Return the form of texts that match a whole regular expression, in the syntax of the Rust crate regex.

        Raises:
            ValueError: the pattern is empty or too large. The engine checks its syntax.
        """
        if not pattern:
            raise ValueError("the regular expression is empty; expected one or more characters.")
        return cls("regex", pattern)

    @classmethod
    def choices(cls, texts: Sequence[str]) -> "Schema":
        """Return the form of exactly one of several texts.

        Raises:
            ValueError: no choices or too many, or a choice is empty, a duplicate, or begins or ends with white space.
        """
        if isinstance(texts, str) or not 1 <= len(texts) <= MAX_CHOICES:
            raise ValueError(f"choices is {str(texts)[:80]!r}; expected a list of 1 to {MAX_CHOICES:,} texts.")
        for text in texts:
            if not isinstance(text, str) or not text or text != text.strip() or not text.isprintable():
                raise ValueError(
                    f"a choice is {text!r}; expected text without control characters or white space around it."
                )
        if len(set(texts)) < len(texts):
            twice = next(text for text in texts if texts.count(text) > 1)
            raise ValueError(f"the choice {twice!r} is given twice.")
        return cls("choices", json.dumps(list(texts), ensure_ascii=False))

    @property
    def value(self) -> Any:
        """The JSON schema as a dict, the regular expression as a text, or the choices as a list."""
        return self.text if self.kind == "regex" else json.loads(self.text)
