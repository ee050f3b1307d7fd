# SPDX-License-Identifier: Apache-2.0
"""One question about one picture, as the sources ask it; prompts and their placeholders."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.row_fields import is_absent
from ..images.videos import reason_of
from ..tokens import IMAGE_TOKEN

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PromptTemplate", "Request", "conversation_about", "printable", "reason_of"]

_PLACEHOLDER = re.compile(r"\{\{([^\W\d][\w -]*)\}\}|\{([^\W\d][\w -]*)\}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row of the output, before it is answered.

    Attributes:
        source: file that the picture is in, or the table that names it.
        question: the prompt, filled in; None where that failed.
        picture: opens the picture; None where there is none to open.
        row: of a table, counted from 0.
        image: what the table calls the picture.
        file: path of the file that the picture is in, if it is in one.
        time: of a video's frame, in seconds from its first frame.
        error: why it cannot be asked.
    """

    source: str
    question: str | None
    picture: "Callable[[], Image] | None" = None
    row: int | None = None
    image: str | None = None
    file: str | None = None
    time: float | None = None
    error: str | None = None


class PromptTemplate:
    """A prompt in which `{column}` stands for a value of a table's row, and `{{column}}` for itself.

    Any other brace is only a brace, so that a prompt may hold JSON.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns = tuple(dict.fromkeys(found[2] for found in _PLACEHOLDER.finditer(text) if found[2]))

    def fill(self, row: Mapping[str, Any]) -> str:
        """Return the prompt of a row.

        Raises:
            ValueError: the row lacks a value, or it is neither text nor a number.
        """

        def value_of(found: "re.Match[str]") -> str:
            if found[1]:
                return f"{{{found[1]}}}"
            value = row.get(found[2])
            if is_absent(value) or value == "":
                raise ValueError(f"column {found[2]!r} of the prompt is empty in this row.")
            if not isinstance(value, str | int | float):
                raise ValueError(
                    f"column {found[2]!r} of the prompt holds a {type(value).__name__}; expected text or a number."
                )
            return str(value)

        return _PLACEHOLDER.sub(value_of, self.text)


def conversation_about(picture: "Image", question: str, system: str | None = None) -> list[dict[str, Any]]:
    """Return the messages of a question: the picture first, or where the text itself says <image>.

    Raises:
        ValueError: the text says it more than once.
    """
    parts = question.split(IMAGE_TOKEN)
    if len(parts) > 2:
        raise ValueError(f"the question has {len(parts) - 1} {IMAGE_TOKEN}, but a row has one picture; write it once.")
    shown = {"type": "image", "image": picture}
    before, after = (parts[0], parts[1]) if len(parts) == 2 else ("", question)
    texts = [[{"type": "text", "text": text}] if text else [] for text in (before, after)]
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*texts[0], shown, *texts[1]]}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def printable(name: str | os.PathLike[str]) -> str:
    """Return a file's name as text that can be written; bytes that are no UTF-8 become their escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
