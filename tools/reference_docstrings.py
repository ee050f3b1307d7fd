# SPDX-License-Identifier: Apache-2.0
"""Extension of griffe, which reads the docstrings for the API reference: what Markdown would misread is rewritten."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Make `Example:` a section of code, and keep `<image>`, which would be an HTML tag."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of `obj`, which was just read."""
        if obj.docstring:
            lines = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n").splitlines()
            obj.docstring.value = "\n".join(line if ">>>" in line else escaped(line) for line in lines)


def escaped(line: str) -> str:
    """Return a line with each `<word>` outside of code as code."""
    parts = line.split("`")
    parts[::2] = [re.sub(r'"?(<[|/]?\w+[|]?>)"?', r"<code>\1</code>", part) for part in parts[::2]]
    return "`".join(re.sub(r"<code>(.*?)</code>", r"`\1`", part) for part in parts)
