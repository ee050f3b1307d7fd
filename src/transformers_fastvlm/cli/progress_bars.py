# SPDX-License-Identifier: Apache-2.0
"""Progress bars on standard error, with the rate and the remaining time."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .cli_errors import is_quiet

__all__ = ["ProgressBar", "progress_bar", "reading_bar"]


class ProgressBar:
    """A bar, and above it, while files are read, a second one.

    Args:
        lines: Rich's progress display.
        doing: word before the bar.
        unit: what the bar counts.
    """

    def __init__(self, lines: Any, doing: str, unit: str) -> None:
        self._lines = lines
        self._files = lines.add_task("reading files", total=None, unit="bytes", visible=False)
        self._work = lines.add_task(doing, total=None, unit=unit)

    def __call__(self, done: int, total: int | None, doing: str | None = None) -> None:
        """Move the bar.

        Args:
            done: what is done.
            total: of how many, None if that is unknown; an estimate may be below `done`.
            doing: replaces the word before the bar.
        """
        most = None if total is None else max(done, total)
        self._lines.update(self._work, completed=done, total=most, description=doing)

    def reading(self, done: int, total: int) -> None:
        """Move the bar of files that are read, in bytes; it is hidden when all are read."""
        self._lines.update(self._files, completed=done, total=total, visible=done < total)


@contextlib.contextmanager
def reading_bar(shown: bool = True, stream: Any = None) -> Iterator[Callable[[int, int], None]]:
    """Yield a function `reading(done, total)` of bytes, whose bar is shown from the first call to the last byte.

    So other bars may follow in the same context.
    """
    with contextlib.ExitStack() as stack:
        show: ProgressBar | None = None

        def reading(done: int, total: int) -> None:
            nonlocal show
            if not shown:
                return
            if show is None:
                show = stack.enter_context(progress_bar("reading files", "bytes", stream))
            show(done, total)
            if done >= total:
                stack.close()
                show = None

        yield reading


@contextlib.contextmanager
def progress_bar(doing: str, unit: str = "", stream: Any = None) -> Iterator[ProgressBar]:
    """Show a bar if standard error is a terminal and --quiet is not given; yield it.

    Args:
        doing: word before the bar.
        unit: what the bar counts, such as "rows"; "bytes" are shown in MB.
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

    class Amount(ProgressColumn):
        def render(self, task: Any) -> Any:
            return (DownloadColumn() if task.fields["unit"] == "bytes" else MofNCompleteColumn()).render(task)

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Any:
            if task.fields["unit"] == "bytes":
                return TransferSpeedColumn().render(task)
            return _rate(task.finished_speed or task.speed, task.fields["unit"])

    console = Console(file=stream, stderr=stream is None)
    lines = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        Amount(),
        Rate(),
        TimeRemainingColumn(),
        console=console,
        disable=is_quiet() or not console.is_terminal,
        transient=True,
        redirect_stdout=stream is None,
        redirect_stderr=stream is None,
    )
    with lines:
        yield ProgressBar(lines, doing, unit)


def _rate(per_second: float | None, unit: str) -> str:
    """Return a rate as text; slow ones by the minute, since "0.0 rows/s" is of no use."""
    if not per_second:
        return ""
    return f"{per_second:.1f} {unit}/s" if per_second >= 1 else f"{60 * per_second:.1f} {unit}/min"
