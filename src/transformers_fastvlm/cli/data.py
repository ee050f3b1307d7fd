# SPDX-License-Identifier: Apache-2.0
"""`fastvlm data`: check training data."""

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .cli_errors import FAILURE, UserError, escaped, reports_errors, warn
from .plain_help import PlainCommand, PlainGroup
from .progress_bars import progress_bar

if TYPE_CHECKING:
    from ..data.check import Report

__all__ = ["app", "check"]

app = typer.Typer(cls=PlainGroup, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _data() -> None:
    """Check training data.

    Examples:

        fastvlm data check train.json --image-folder images

        fastvlm data check train.json --json > problems.json
    """


class ConversationName(enum.StrEnum):
    """Values of --conversation."""

    sft = "sft"
    plain = "plain"


@app.command("check", cls=PlainCommand)
@reports_errors
def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .json, .jsonl or .parquet file, a folder of them, or a Hugging Face data set (name or folder).",
        ),
    ],
    image_folder: Annotated[
        Path | None, typer.Option(help="Folder that the rows' paths are relative to. Default: the file's folder.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hugging Face data set. Default: train.")] = None,
    name: Annotated[str | None, typer.Option(help="Configuration of a Hugging Face data set.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Count tokens for this checkpoint: a directory, a hub repository or tiny."),
    ] = None,
    conversation: Annotated[
        ConversationName, typer.Option(help="Format of the training samples; needs --model.")
    ] = ConversationName.sft,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens of a sample in the run; needs --model.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Check only this many rows, from the start.")] = None,
    workers: Annotated[int, typer.Option(min=0, max=64, help="Additional reading processes.")] = 0,
    show: Annotated[int, typer.Option(min=0, help="Maximum number of rows to list; --json lists all.")] = 100,
    follow_symlinks: Annotated[
        bool, typer.Option("--follow-symlinks", help="Allow links that point outside the image folder.")
    ] = False,
    do_exif_transpose: options.ExifTranspose = True,
    alpha_background: options.AlphaBackground = "white",
    max_pixels: options.MaxPixels = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Read every row, decode every image, and list the problems by row.

    Rows count from 0, lines from 1. The exit code is 1 if there are problems. To train without the listed rows, save
    the output of --json in a file and pass it as `exclude` of a recipe or of `transformers_fastvlm.data.load`.

    Examples:

        fastvlm data check train.json --image-folder images

        fastvlm data check train.json --model apple/FastVLM-0.5B --max-length 2048
    """
    if model is None and (max_length is not None or conversation is not ConversationName.sft):
        raise UserError("--max-length and --conversation need --model: its tokenizer counts the tokens.")
    from ..data.check import check_dataset

    processor = None if model is None else _processor(model)
    with progress_bar("reading", "rows") as show_progress:
        report = check_dataset(
            source,
            image_folder,
            split=split,
            name=name,
            follow_symlinks=follow_symlinks,
            do_exif_transpose=do_exif_transpose,
            alpha_background=alpha_background,
            max_pixels=max_pixels,
            processor=processor,
            conversation=conversation.value,
            max_length=max_length,
            limit=limit,
            num_workers=workers,
            progress=show_progress,
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        for problem in report.problems[:show]:
            typer.echo(escaped(str(problem)))
        if len(report.problems) > show:
            warn(f"{len(report.problems) - show:,} more rows are wrong; --show lists more, --json all.")
        for line in _summary(report, max_length):
            typer.echo(escaped(line))
    if not report.ok:
        raise typer.Exit(FAILURE)


def _processor(model: str) -> Any:
    from .. import FastVLMProcessor
    from ..checkpoints.embedded import resolve_model
    from .model_sources import check_loadable, read_config

    check_loadable(model, read_config(model))
    return FastVLMProcessor.from_pretrained(resolve_model(model))


def _summary(report: "Report", max_length: int | None) -> list[str]:
    right = report.checked - len({problem.row for problem in report.problems if problem.row < report.checked})
    read = (
        f"{report.checked:,} rows" if report.checked == report.rows else f"{report.checked:,} of {report.rows:,} rows"
    )
    lines = [
        f"{read} read, {right:,} valid ({report.text_only:,} of them text only), {report.images:,} images, "
        f"{len(report.problems):,} problems"
    ]
    if report.tokens is not None:
        tokens = {key: f"{value:,.0f}" for key, value in report.tokens.items()}
        order = ("min", "median", "mean", "p95", "p99", "max")
        lines.append(f"{tokens['total']} tokens; a row: " + ", ".join(f"{key} {tokens[key]}" for key in order))
    if report.unread:
        listed = ", ".join(f"{key} ({count:,})" for key, count in report.unread.items())
        lines.append(f"ignored keys, with their number of rows: {listed}")
    if report.longer is not None:
        lines.append(f"{report.longer:,} rows are longer than {max_length:,} tokens and will be truncated")
    return lines
