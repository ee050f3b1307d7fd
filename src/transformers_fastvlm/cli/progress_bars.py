# SPDX-License-Identifier: Apache-2.0
"""Progress bars on standard error, with the rate and the remaining time."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .cli_errors import is_quiet

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(doing: str, unit: str = "", stream: Any = None) -> Iterator[Callable[..., None]]:
    """Show a bar if standard error is a terminal; yield the function that moves it, `show(done, total, doing)`.

    With --quiet there is no bar. The third argument of the function is optional and replaces the word before the bar.

    Args:
        doing: word before the bar.
        unit: what `done` and `total` count, such as "rows"; "bytes" are shown in MB. The total may be None, or an
            estimate below `done`.
        stream: replaces standard error. Other output is then not redirected above the bar.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Any:
            return _rate(task.finished_speed or task.speed, unit)

    in_bytes = unit == "bytes"
    console = Console(file=stream, stderr=stream is None)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TransferSpeedColumn() if in_bytes else Rate(),
        TimeRemainingColumn(),
        console=console,
        disable=is_quiet() or not console.is_terminal,
        transient=True,
        redirect_stdout=stream is None,
        redirect_stderr=stream is None,
    )
    task = bar.add_task(doing, total=None)

    def show(done: int, total: int | None, doing: str | None = None) -> None:
        bar.update(task, completed=done, total=None if total is None else max(done, total), description=doing)

    with bar:
        yield show


def _rate(per_second: float | None, unit: str) -> str:
    """Return a rate as text; slow ones by the minute, since "0.0 rows/s" tells nothing."""
    if not per_second:
        return ""
    return f"{per_second:.1f} {unit}/s" if per_second >= 1 else f"{60 * per_second:.1f} {unit}/min"
