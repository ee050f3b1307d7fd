# SPDX-License-Identifier: Apache-2.0
"""Progress bars on standard error."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(doing: str, stream: Any = None, in_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """Show a bar if standard error is a terminal; yield the function that moves it, `show(done, total)`.

    Args:
        doing: word before the bar.
        stream: replaces standard error. Other output is then not redirected above the bar.
        in_bytes: `done` and `total` are bytes. The total may be None, or an estimate below `done`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=stream, stderr=stream is None)
    columns = (TextColumn(doing), BarColumn(), DownloadColumn() if in_bytes else MofNCompleteColumn())
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        redirect_stdout=stream is None,
        redirect_stderr=stream is None,
    )
    task = bar.add_task(doing, total=None)
    with bar:
        yield lambda done, total, *_: bar.update(
            task, completed=done, total=None if total is None else max(done, total)
        )
