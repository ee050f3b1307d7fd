# SPDX-License-Identifier: Apache-2.0
"""`fastvlm batch`: ask the same question about many images and write the answers into one file."""

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .cli_errors import FAILURE, INTERRUPTED, TERMINATED, notice, one_line, reports_errors, warn
from .progress_bars import progress_bar

if TYPE_CHECKING:
    from ..batch import Report
    from ..engines import Engine

__all__ = ["Stopping", "batch"]


@reports_errors
def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Images, videos, folders (searched with their subfolders), quoted patterns such as "
            "'photos/**/*.jpg', and tables: .csv, .tsv, .json, .jsonl, .parquet.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="File to write: .jsonl, .parquet, or .srt for the captions of one video."),
    ],
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            callback=options.utf8,
            help="Question about each image. {column} is replaced by the row's value in that column of a table.",
        ),
    ],
    model: options.Model = options.DEFAULT_MODEL,
    engine: options.Engine = options.EngineName.transformers,
    precision: options.Precision = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images answered together. A killed run loses at most two batches.")
    ] = 16,
    image_column: options.ImageColumn = "image",
    image_folder: options.ImageFolder = None,
    every: options.Every = 5.0,
    srt: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also write the captions of each video as FOLDER/NAME.srt."),
    ] = None,
    restart: options.Restart = False,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DtypeName.auto,
    size: options.Size = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    schema: options.SchemaFile = None,
    choices: options.Choices = None,
    regex: options.Regex = None,
    do_exif_transpose: options.ExifTranspose = True,
    alpha_background: options.AlphaBackground = "white",
    max_pixels: options.MaxPixels = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Ask the same question about many images and write one row for each.

    Answers are saved after each batch. To resume a run that was killed or stopped, repeat the command. An image that
    cannot be read gets a row with the error, and the exit code is 1.

    Examples:

        fastvlm batch rows.csv -o out.parquet -p "{question}" --image-column file

        fastvlm batch photos -o signs.jsonl -p "What sign?" --schema sign.json
    """
    from ..batch import BatchOptions, Interrupted, run_batch
    from .asking import check_model, engine_settings, load, sampling_of, schema_of

    form = schema_of(schema, choices, regex)
    sampling = sampling_of(max_new_tokens, temperature, top_p, seed, schema=form)
    settings = engine_settings(engine, precision, device, dtype, size)
    check_model(engine, model)

    def start() -> "Engine":
        from transformers.utils import logging

        logging.disable_progress_bar()
        return load(engine, model, settings, batch_size)

    chosen = BatchOptions(
        prompt=prompt,
        image_column=image_column,
        image_folder=None if image_folder is None else str(image_folder),
        every=every,
        do_exif_transpose=do_exif_transpose,
        alpha_background=alpha_background,
        max_pixels=max_pixels,
        system=system,
        sampling=sampling,
        batch_size=batch_size,
    )
    about = {"model": model, "engine": engine.value, **settings}
    stopping = Stopping()
    try:
        with stopping, progress_bar("answering", "rows") as show:
            report = run_batch(
                inputs,
                output,
                start,
                chosen,
                about=about,
                subtitles=srt,
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
    from ..images.formats import advice_about

    advice = advice_about(report.left_out)
    _tell(report, advice)
    if report.errors or advice:  # images without an answer, either way
        raise typer.Exit(FAILURE)


class Stopping:
    """A context in which SIGTERM ends a run as Ctrl-C does, with another exit code.

    Attributes:
        code: the exit code of a run that was stopped.
    """

    def __init__(self) -> None:
        self.code = INTERRUPTED
        self._before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._stop)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _stop(self, *_: object) -> None:
        self.code = TERMINATED
        raise KeyboardInterrupt


def _tell(report: "Report", advice: str = "") -> None:
    from ..batch.batch_rows import counted

    details = []
    if report.resumed_rows:
        details.append(f"{report.resumed_rows:,} of them from earlier runs")
    if report.cut:
        details.append(f"{report.cut:,} cut at --max-new-tokens")
    notice(f"{counted(report.rows, 'row')} in {report.output}" + (f" ({', '.join(details)})" if details else ""))
    for path in report.subtitles:
        notice(f"captions in {path}")
    if report.left_out:
        kinds = ", ".join(f"{number:,} {suffix}" for suffix, number in sorted(report.left_out.items()))
        number = counted(sum(report.left_out.values()), "file")
        say = warn if advice else notice  # advice is about images without an answer
        say(f"{number} in the folders skipped, neither readable images nor videos: {kinds}{advice}")
    if report.first_only:
        notice(f"{counted(report.first_only, 'image')} with several frames or pages: only the first was used")
    if report.errors:
        warn(f"fastvlm: {counted(report.errors, 'row')} without an answer:")
        for place, error in report.examples:
            warn(f"  {place}: {one_line(ValueError(error))}")
        if report.errors > len(report.examples):
            warn(f"  and {report.errors - len(report.examples):,} more; see `error` in {report.output}")
