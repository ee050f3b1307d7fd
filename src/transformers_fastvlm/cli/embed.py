# SPDX-License-Identifier: Apache-2.0
"""`fastvlm embed`: write one vector for each image or text into one file."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .batch import Stopping
from .cli_errors import FAILURE, UserError, notice, one_line, reports_errors, warn
from .progress_bars import progress_bar

if TYPE_CHECKING:
    from ..batch import Report
    from ..embedding import Embedder

__all__ = ["embed"]


class PoolingName(enum.StrEnum):
    """Values of --pooling."""

    last = "last"
    mean = "mean"
    encoder = "encoder"


@reports_errors
def embed(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Images, videos, folders (searched with their subfolders), quoted patterns such as "
            "'photos/**/*.jpg', tables: .csv, .tsv, .json, .jsonl, .parquet, and .txt files with a text on each line.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="File to write: .parquet; or .npy, with a file .ids.jsonl that describes its rows."
        ),
    ],
    model: options.Model = options.DEFAULT_MODEL,
    pooling: Annotated[
        PoolingName,
        typer.Option(
            help="last: the language model's state at the last token; mean: the mean over all tokens; encoder: the "
            "vector of the image encoder, without the language model."
        ),
    ] = PoolingName.last,
    normalize: Annotated[bool, typer.Option("--normalize/--no-normalize", help="Give every vector length 1.")] = True,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            callback=options.utf8,
            help="Text to embed with each image. {column} is replaced by the row's value in that column of a table.",
        ),
    ] = "",
    text_column: Annotated[
        str | None, typer.Option(help="Column of a table with texts, which are embedded without images.")
    ] = None,
    system: options.System = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows embedded together. A killed run loses at most one batch.")
    ] = 16,
    image_column: options.ImageColumn = "image",
    image_folder: options.ImageFolder = None,
    every: options.Every = 5.0,
    restart: options.Restart = False,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DtypeName.auto,
    size: options.Size = None,
    do_exif_transpose: options.ExifTranspose = True,
    alpha_background: options.AlphaBackground = "white",
    max_pixels: options.MaxPixels = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write one vector for each image or text.

    Vectors are saved after each batch. To resume a run that was killed or stopped, repeat the command. An image that
    cannot be read gets a row with the error, and the exit code is 1.

    Examples:

        fastvlm embed photos -o photos.parquet

        fastvlm embed captions.csv -o captions.npy --text-column caption
    """
    from ..batch import EmbedOptions, Interrupted, run_embed
    from ..embedding import Embedder
    from ..images.formats import advice_about

    if text_column is not None and prompt:
        raise UserError("--text-column and --prompt cannot be combined; to embed images with a text, use --prompt.")
    if pooling == PoolingName.encoder and (prompt or text_column or system):
        raise UserError("--pooling encoder embeds images alone; leave out --prompt, --text-column and --system.")
    how = {"pooling": pooling.value, "normalize": normalize, "device": device, "dtype": dtype.value, "size": size}

    def start() -> "Embedder":
        from transformers.utils import logging

        logging.disable_progress_bar()
        return Embedder(model, system=system, **how)  # type: ignore[arg-type]

    chosen = EmbedOptions(
        prompt=prompt if text_column is None else f"{{{text_column}}}",
        image_column=image_column if text_column is None else None,
        image_folder=None if image_folder is None else str(image_folder),
        every=every,
        do_exif_transpose=do_exif_transpose,
        alpha_background=alpha_background,
        max_pixels=max_pixels,
        system=system,
        batch_size=batch_size,
    )
    stopping = Stopping()
    try:
        with stopping, progress_bar("embedding", "rows") as show:
            report = run_embed(
                inputs,
                output,
                start,
                chosen,
                about={"model": model, **how},
                restart=restart,
                progress=show,
                reading=show.reading,
            )
    except Interrupted as error:
        saved = f" They are saved in {error.journal}; repeat the command to resume." if error.rows else ""
        warn(f"fastvlm: {one_line(error)}{saved}")
        raise typer.Exit(stopping.code) from None
    except KeyboardInterrupt:
        warn("fastvlm: stopped before the first row.")
        raise typer.Exit(stopping.code) from None
    advice = advice_about(report.left_out)
    _tell(report, advice)
    if report.errors or advice:  # images without a vector, either way
        raise typer.Exit(FAILURE)


def _tell(report: "Report", advice: str) -> None:
    from ..batch.batch_rows import counted

    resumed = f" ({report.resumed_rows:,} of them from earlier runs)" if report.resumed_rows else ""
    notice(f"{counted(report.rows, 'row')} in {report.output}{resumed}")
    if report.left_out:
        number = counted(sum(report.left_out.values()), "file")
        notice(f"{number} in the folders skipped, neither readable images nor videos{advice}")
    if report.first_only:
        notice(f"{counted(report.first_only, 'image')} with several frames or pages: only the first was used")
    if report.errors:
        warn(f"fastvlm: {counted(report.errors, 'row')} without a vector:")
        for place, error in report.examples:
            warn(f"  {place}: {one_line(ValueError(error))}")
        if report.errors > len(report.examples):
            warn(f"  and {report.errors - len(report.examples):,} more; see `error` in the output")
