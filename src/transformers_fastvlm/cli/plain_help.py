# SPDX-License-Identifier: Apache-2.0
"""Verbs with help in plain text: Rich's panels leave only 24 of 80 columns to the description of an option.

They also accept earlier names of options, which no help shows.
"""

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["EARLIER_NAMES", "PlainCommand", "PlainGroup"]

EARLIER_NAMES = {"--out": "--output", "--batch": "--batch-size", "--image-size": "--size", "--prompt": "--suffix"}
"""Earlier names of options, each with today's name."""


class PlainCommand(TyperCommand):
    """A verb with plain help."""

    def __init__(self, name: str | None, **options: Any) -> None:
        super().__init__(name, **(options | {"rich_markup_mode": None}))

    def make_parser(self, ctx: Any) -> Any:
        """Return the parser, which also knows the earlier names of the verb's options."""
        parser: Any = super().make_parser(ctx)
        named = {name: option for option in self.params for name in option.opts}
        for earlier, name in EARLIER_NAMES.items():
            if earlier not in named and name in named:
                parser.add_option(named[name], [earlier], named[name].name, nargs=1)
        return parser

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words of the usage line, without the braces that Typer puts around arguments."""
        return [re.sub(r"^\{(.+)\}(\.\.\.)?$", r"\1\2", piece) for piece in super().collect_usage_pieces(ctx)]


class PlainGroup(TyperGroup):
    """A group of verbs with plain help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**(options | {"rich_markup_mode": None}))
