# SPDX-License-Identifier: Apache-2.0
"""How a verb fails: one clear line on standard error and an exit code, or with --debug the traceback."""

import functools
from collections.abc import Callable
from typing import Any

import typer

from .. import register

__all__ = ["UserError", "notice", "one_line", "reports_errors"]

INPUT_ERROR = 2
FAILURE = 1


class UserError(Exception):
    """Input that cannot be used; the message says which, what was expected and what to do."""


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def notice(message: str) -> None:
    """Print a line on standard error."""
    typer.echo(message, err=True)


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Register FastVLM, run a verb, and turn its exceptions into one line and an exit code, unless `debug` is set.

    The package raises ValueError and OSError for input that it cannot use: those are exit code 2, all others 1.

    Registering is up to the verbs because it imports torch, which the help of none of them needs.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            register()
            command(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of the output went away; not for us to report
        except (UserError, OSError, ValueError, ImportError) as error:
            if kwargs.get("debug"):
                raise
            notice(f"fastvlm: {one_line(error)}")
            raise typer.Exit(INPUT_ERROR) from error
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if kwargs.get("debug") or type(error).__module__.startswith(("click", "typer")):
                raise
            if type(error).__name__ == "OutOfMemoryError":
                notice("fastvlm: out of memory. Try a smaller --size, --dtype bfloat16, or --device cpu.")
            else:
                notice(f"fastvlm: {type(error).__name__}: {one_line(error)} (--debug shows where)")
            raise typer.Exit(FAILURE) from error

    return wrapper
