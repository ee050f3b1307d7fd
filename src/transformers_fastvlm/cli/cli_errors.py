# SPDX-License-Identifier: Apache-2.0
"""Errors of a verb: one clear line on standard error and an exit code, or with --debug the traceback."""

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer

from .. import register
from ..storage.atomic_files import DISK_FULL

__all__ = ["UserError", "escaped", "is_quiet", "notice", "one_line", "reports_errors", "warn"]

# Control characters of C0 and C1, line separators, bidirectional controls and surrogates.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
INPUT_ERROR = 2
FAILURE = 1
INTERRUPTED, TERMINATED = 130, 143
"""Exit codes for SIGINT and SIGTERM, as in shells."""


_quiet = False
"""Whether the running verb was called with --quiet."""


class UserError(Exception):
    """Input that cannot be used. The message names it, what was expected and what to do."""


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, or the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def escaped(text: str) -> str:
    """Return a line with its control characters escaped.

    File names and rows are untrusted: raw control characters could move the cursor, write the clipboard or forge
    further lines.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def is_quiet() -> bool:
    """Return whether the running verb prints neither notes nor progress (--quiet)."""
    return _quiet


def notice(message: str) -> None:
    """Print a note on standard error, unless --quiet is given."""
    if not _quiet:
        warn(message)


def warn(message: str) -> None:
    """Print a warning, an error or another line that --quiet does not hide on standard error."""
    typer.echo(escaped(message), err=True)


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Register FastVLM, run a verb, and turn its exceptions into one line and an exit code, unless `debug` is set.

    The package raises ValueError and OSError for input that it cannot use: these give exit code 2, but a full disk and
    all other errors give 1.

    Registration imports torch, so it waits until a verb runs: no help text needs torch.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            register()
            with _notes_as_before(bool(kwargs.get("quiet"))), _bars_as_before():
                command(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of the output is gone, so there is nobody to report to
        except (UserError, OSError, ValueError, ImportError) as error:
            if kwargs.get("debug"):
                raise
            warn(f"fastvlm: {one_line(error)}")
            is_full = isinstance(error, OSError) and error.errno in DISK_FULL
            raise typer.Exit(FAILURE if is_full else INPUT_ERROR) from error
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if kwargs.get("debug") or type(error).__module__.startswith(("click", "typer")):
                raise
            if type(error).__name__ == "OutOfMemoryError":
                warn("fastvlm: out of memory. Try a smaller --size, --dtype bfloat16, or --device cpu.")
            else:
                warn(f"fastvlm: {type(error).__name__}: {one_line(error)} (--debug shows where)")
            raise typer.Exit(FAILURE) from error

    return wrapper


@contextlib.contextmanager
def _notes_as_before(quiet: bool) -> Iterator[None]:
    """Set --quiet for one call of a verb; restore the setting afterwards, for Python callers."""
    global _quiet
    before, _quiet = _quiet, quiet
    try:
        yield
    finally:
        _quiet = before


@contextlib.contextmanager
def _bars_as_before() -> Iterator[None]:
    """Show Transformers' progress bars only on a terminal, and not with --quiet; restore the setting afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if _quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
