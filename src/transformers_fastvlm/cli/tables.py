# SPDX-License-Identifier: Apache-2.0
"""Tables on standard output."""

import sys
from collections.abc import Sequence

import typer

__all__ = ["print_table"]

_PLAIN_WIDTH = 160
"""Columns of a table that does not go to a terminal."""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is aligned left and whose others are aligned right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    # typer.echo and not Console.print, so that the output can be redirected and tested as that of other verbs.
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines()))
