# SPDX-License-Identifier: Apache-2.0
"""`fastvlm batch`: the same question about many pictures, answered into one file."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .cli_errors import FAILURE, INTERRUPTED, TERMINATED, notice, one_line, reports_errors
from .progress_bars import progress_bar

if TYPE_CHECKING:
    from ..batch import Report
    from ..engines import Engine

__all__ = ["batch"]


@reports_errors
def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Pictures, videos, folders (with all that is in them), quoted patterns such as 'photos/**/*.jpg', "
            "and tables: .csv, .tsv, .json, .jsonl, .parquet.",
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
            help="What to ask of each picture. {column} in it stands for a value of a table's row.",
        ),
    ],
    model: options.Model = options.DEFAULT_MODEL,
    engine: options.Engine = options.EngineName.transformers,
    precision: options.Precision = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pictures that are answered together; a kill costs one such batch at most.")
    ] = 16,
    image_column: Annotated[str, typer.Option(help="A table's column with the paths of pictures, or their bytes.")] = (
        "image"
    ),
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Where a table's paths begin and must stay in; the table's own folder by default."),
    ] = None,
    every: Annotated[float, typer.Option(help="Seconds between the frames that are taken of a video.")] = 5.0,
    srt: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also write the captions of each video as FOLDER/NAME.srt."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again, whatever is done or written; replaces the output.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DtypeName.auto,
    size: options.Size = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    do_exif_transpose: options.ExifTranspose = True,
    alpha_background: options.AlphaBackground = "white",
    max_pixels: options.MaxPixels = None,
    debug: options.Debug = False,
) -> None:
    """Ask the same question about many pictures; write a row for each.

    What is done is on the disk after each batch. Killed or stopped, the same command goes on where it was. Pictures
    that cannot be read get a row with the error; the exit code is then 1. Apple's weights are for research only.

    Example: fastvlm batch photos -o captions.jsonl -p "Describe the picture."
    """
    from ..batch import BatchOptions, Interrupted, run_batch
    from .asking import check_model, engine_settings, load, sampling_of

    sampling = sampling_of(max_new_tokens, temperature, top_p, seed)
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
    stopping = _Stopping()
    try:
        with stopping, progress_bar("answering") as show:
            report = run_batch(
                inputs, output, start, chosen, about=about, subtitles=srt, restart=restart, progress=show
            )
    except Interrupted as error:
        kept = f" They are kept in {error.journal}; the same command goes on from there." if error.rows else ""
        notice(f"fastvlm: {one_line(error)}{kept}")
        raise typer.Exit(stopping.code) from None
    except KeyboardInterrupt:
        notice("fastvlm: stopped before the first row.")
        raise typer.Exit(stopping.code) from None
    from ..images.formats import advice_about

    advice = advice_about(report.left_out)
    _tell(report, advice)
    if report.errors or advice:  # images without an answer, either way
        raise typer.Exit(FAILURE)


class _Stopping:
    """Within, SIGTERM ends a run as Ctrl-C does, with an exit code of its own.

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


def _tell(report: "Report", advice: str = "", say: Callable[[str], None] = notice) -> None:
    from ..batch.batch_rows import counted

    details = []
    if report.resumed_rows:
        details.append(f"{report.resumed_rows:,} of them done before")
    if report.cut:
        details.append(f"{report.cut:,} cut at --max-new-tokens")
    say(f"{counted(report.rows, 'row')} in {report.output}" + (f" ({', '.join(details)})" if details else ""))
    for path in report.subtitles:
        say(f"captions in {path}")
    if report.left_out:
        kinds = ", ".join(f"{number:,} {suffix}" for suffix, number in sorted(report.left_out.items()))
        number = counted(sum(report.left_out.values()), "file")
        say(f"{number} in the folders left out, neither images that can be read nor videos: {kinds}{advice}")
    if report.first_only:
        say(f"{counted(report.first_only, 'image')} with several frames or pages: the first was asked about")
    if report.errors:
        say(f"fastvlm: {counted(report.errors, 'row')} without an answer:")
        for place, error in report.examples:
            say(f"  {place}: {one_line(ValueError(error))}")
        if report.errors > len(report.examples):
            say(f"  and {report.errors - len(report.examples):,} more; see `error` in {report.output}")
