# SPDX-License-Identifier: Apache-2.0
"""The command `fastvlm`. Each verb has a file, which parses the options, calls the package and prints.

Answers go to standard output, everything else to standard error. Exit codes: 0, 1 for a failure of the program, 2 for
input that cannot be used. No module here imports torch before a verb needs it.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .. import __version__
from . import (
    batch,
    bench,
    chat,
    convert,
    data,
    demo,
    embed,
    env,
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
from .plain_help import PlainCommand

__all__ = ["app", "main"]

app = typer.Typer(
    name="fastvlm",
    help="FastVLM on the command line: answer questions about images. `fastvlm VERB --help` explains each verb.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


_GROUPS: dict[str, dict[str, Any]] = {
    "Ask": {
        "generate": generate.generate,
        "chat": chat.chat,
        "batch": batch.batch,
        "embed": embed.embed,
        "demo": demo.demo,
    },
    "Train": {"train": train.train, "data": data.app, "merge": merge.merge, "new": new.new},
    "Measure": {
        "eval": eval.evaluate,
        "eval-report": eval_report.eval_report,
        "eval-encoder": eval_encoder.eval_encoder,
        "bench": bench.bench,
    },
    "Serve and convert": {"serve": serve.serve, "export": export.export, "convert": convert.convert},
    "Inspect": {"info": info.info, "env": env.env},
}
for _group, _verbs in _GROUPS.items():
    for _name, _verb in _verbs.items():
        if isinstance(_verb, typer.Typer):
            app.add_typer(_verb, name=_name, rich_help_panel=_group)
        else:
            app.command(_name, cls=PlainCommand, rich_help_panel=_group)(_verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastvlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit.

    Args:
        arguments: words after `fastvlm`; by default the arguments of the process.

    Raises:
        SystemExit: always, with the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # An answer may hold any character. Consoles that lack it show a question mark.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
    # Transformers imports torchao if it is installed, and recent PyTorch warns about how torchao registers types.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    app(args=None if arguments is None else list(arguments), prog_name="fastvlm")
