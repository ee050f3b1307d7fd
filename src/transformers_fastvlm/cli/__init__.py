# SPDX-License-Identifier: Apache-2.0
"""The command `fastvlm`: one file a verb, each of which parses, calls the package and prints.

Answers go to standard output, everything else to standard error. Exit codes: 0, 1 for a failure of the program, 2 for
input that cannot be used. Nothing here imports torch before a verb needs it.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from . import (
    batch,
    bench,
    chat,
    convert,
    data,
    demo,
    eval,
    eval_encoder,
    eval_report,
    export,
    generate,
    info,
    merge,
    new,
    serve,
    train,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="fastvlm",
    help="FastVLM on the command line: answer questions about pictures. `fastvlm VERB --help` explains each verb.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("demo")(demo.demo)
app.command("info")(info.info)
app.command("convert")(convert.convert)
app.command("export")(export.export)
app.command("new")(new.new)
app.command("serve")(serve.serve)
app.command("batch")(batch.batch)
app.command("bench")(bench.bench)
app.command("eval")(eval.evaluate)
app.command("eval-report")(eval_report.eval_report)
app.command("eval-encoder")(eval_encoder.eval_encoder)
app.command("train")(train.train)
app.command("merge")(merge.merge)
app.add_typer(data.app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastvlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit.

    Args:
        arguments: words after `fastvlm`; those of the process by default.

    Raises:
        SystemExit: always, with the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # An answer may hold any character; a console that lacks it shows a question mark.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
    # Transformers imports torchao where it is installed, and recent PyTorch comments on how that registers its types.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    app(args=None if arguments is None else list(arguments), prog_name="fastvlm")
