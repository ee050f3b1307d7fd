# SPDX-License-Identifier: Apache-2.0
"""Text files, each line of which is a request without an image."""

from collections.abc import Callable, Iterator
from typing import Any

from ..storage.digests import file_digest
from .requests import Request, SourceOptions, printable

__all__ = ["TEXTS", "TextSource"]

TEXTS = (".txt",)


class TextSource:
    """A text file in UTF-8 with a text on each line; empty lines are left out.

    Args:
        name: path of the file.
        options: options for requests.

    Raises:
        ValueError: the options have a prompt, but the lines are the texts.
        OSError: the file cannot be read.
    """

    def __init__(self, name: str, options: SourceOptions) -> None:
        if options.prompt:
            raise ValueError(f"{name!r} has a text on each line, so it takes no prompt. Leave the prompt out.")
        self.name, self.options = name, options
        self._count = sum(1 for _ in self._lines())

    def identity(self, advance: Callable[[int], None]) -> dict[str, Any]:
        """Return name, number of texts, and a digest of the file; `advance` gets the number of bytes of each chunk."""
        return {"name": printable(self.name), "count": self._count, "digest": file_digest(self.name, advance)}

    def rows(self) -> int:
        """Return the number of texts."""
        return self._count

    def __iter__(self) -> Iterator[Request]:
        source = printable(self.name)
        for index, line in enumerate(self._lines()):
            try:
                yield Request(source=source, row=index, question=line.decode())
            except UnicodeDecodeError:
                yield Request(source=source, row=index, question=None, error="the line is not UTF-8. Convert the file.")

    def _lines(self) -> Iterator[bytes]:
        with open(self.name, "rb") as file:
            for line in file:
                if text := line.removeprefix(b"\xef\xbb\xbf").strip():
                    yield text
