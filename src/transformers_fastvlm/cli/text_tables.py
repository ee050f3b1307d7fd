# SPDX-License-Identifier: Apache-2.0
"""Tables on standard output."""

import sys
from collections.abc import Iterator, Sequence

import typer

__all__ = ["print_table"]

_PLAIN_WIDTH = 160
"""Width of a table if standard output is not a terminal, in columns."""

_ANY_WIDTH = 10_000
"""Width to measure tables with, enough for every table."""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with the first column aligned left and the others aligned right.

    A terminal that is too narrow gets a list for each row, with a line for each column: truncated numbers would be
    wrong.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # typer.echo instead of Console.print, so that this output can be redirected and tested like any other.
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, color_system=None)
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    if console.measure(table, options=console.options.update(width=_ANY_WIDTH)).maximum > console.width:
        typer.echo("\n".join(_lists(title, columns, rows)))
        return
    with console.capture() as capture:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines()))


def _lists(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    label = max(map(len, columns))
    yield title
    for row in rows:
        yield ""
        for column, value in zip(columns, row, strict=True):
            yield f"  {column:<{label}}  {value}".rstrip()
