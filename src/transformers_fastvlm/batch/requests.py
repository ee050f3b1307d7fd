# SPDX-License-Identifier: Apache-2.0
"""Requests of the sources: one question about one image; and prompt templates with columns of a table."""

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
    """Options for requests and for reading images; see also `ReadOptions`.

    Args:
        prompt: the question; `{column}` is replaced by a table's value.
        image_column: a table's column of images: paths, or in Parquet also the bytes of files.
        image_folder: folder that a table's paths are relative to and may not leave; None for the table's folder.
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
        source: file of the image, or the table that names it.
        question: the filled prompt; None after an error.
        open_image: opens the image; None if there is none.
        row: row of a table, from 0.
        image: name of the image in the table.
        file: path of the image's file, if it has one.
        time: time of a video's frame, in seconds from the first frame.
        error: error that prevents the question.
    """

    source: str
    question: str | None
    open_image: "Callable[[], Image] | None" = None
    row: int | None = None
    image: str | None = None
    file: str | None = None
    time: float | None = None
    error: str | None = None

    def file_state(self) -> list[int] | None:
        """Return a value that changes with the image's file; None if there is no file."""
        return None if self.file is None else state_of(self.file)


class PromptTemplate:
    """A prompt in which `{column}` is replaced by a value of a table's row, and `{{column}}` by `{column}`.

    Other braces are literal, so a prompt may contain JSON.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns = tuple(dict.fromkeys(found[2] for found in _PLACEHOLDER.finditer(text) if found[2]))

    def fill(self, row: Mapping[str, Any]) -> str:
        """Return the prompt of a row.

        Raises:
            ValueError: the row lacks a value, or the value is neither text nor a number.
        """

        def value_of(found: "re.Match[str]") -> str:
            if found[1]:
                return f"{{{found[1]}}}"
            value = row.get(found[2])
            if is_absent(value) or value == "":
                raise ValueError(f"column {found[2]!r} of the prompt is empty in this row.")
            if not isinstance(value, str | int | float):
                raise ValueError(
                    f"column {found[2]!r} of the prompt is a {type(value).__name__}; expected text or a number."
                )
            return str(value)

        return _PLACEHOLDER.sub(value_of, self.text)


def printable(name: str | os.PathLike[str]) -> str:
    """Return a file's name as valid text; bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
