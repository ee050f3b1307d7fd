# SPDX-License-Identifier: Apache-2.0
"""Verbs with help in plain text: Rich's panels leave only 24 of 80 columns to the description of an option."""

from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["PlainCommand", "PlainGroup"]


class PlainCommand(TyperCommand):
    """A verb with plain help."""

    def __init__(self, name: str | None, **options: Any) -> None:
        super().__init__(name, **(options | {"rich_markup_mode": None}))


class PlainGroup(TyperGroup):
    """A group of verbs with plain help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**(options | {"rich_markup_mode": None}))
