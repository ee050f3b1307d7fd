# SPDX-License-Identifier: Apache-2.0
"""Requests, which the sources make: one question about one picture; and prompts with the columns of a table in them."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.row_fields import is_absent
from ..images.read_options import ReadOptions
from ..storage.atomic_files import state_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EXTRA", "PromptTemplate", "Request", "SourceOptions", "printable"]

EXTRA = 'pip install "transformers-fastvlm[batch]"'

_PLACEHOLDER = re.compile(r"\{\{([^\W\d][\w -]*)\}\}|\{([^\W\d][\w -]*)\}")


@dataclass(frozen=True, kw_only=True)
class SourceOptions(ReadOptions):
    """How requests are made of inputs, and how images are read; see `ReadOptions`.

    Args:
        prompt: what to ask; `{column}` stands for a table's value.
        image_column: a table's column of pictures: paths, or in Parquet also the bytes of files.
        image_folder: where a table's paths begin and stay in; None for the table's own folder.
        every: seconds between a video's frames.
    """

    prompt: str
    image_column: str = "image"
    image_folder: str | None = None
    every: float = 5.0


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

    def file_state(self) -> list[int] | None:
        """Return what changes when the picture's file does; None where it is in no file, or that is gone."""
        return None if self.file is None else state_of(self.file)


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


def printable(name: str | os.PathLike[str]) -> str:
    """Return a file's name as text that can be written; bytes that are no UTF-8 become their escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
