# SPDX-License-Identifier: Apache-2.0
"""`fastvlm eval`: evaluate a checkpoint on the model card's benchmarks or on your own questions."""

import enum
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .cli_errors import UserError, is_quiet, notice, reports_errors
from .progress_bars import progress_bar

if TYPE_CHECKING:
    from ..evaluation.results import EvaluationRun

__all__ = ["evaluate"]


class MetricName(enum.StrEnum):
    """Values of --metric."""

    exact = "exact"
    letter = "letter"
    vqa = "vqa"
    anls = "anls"
    relaxed = "relaxed"
    substring = "substring"


@reports_errors
def evaluate(
    model: options.ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for the results; an unfinished run in it is resumed.")
    ],
    tasks: Annotated[
        str | None,
        typer.Option(help="lmms-eval tasks, separated by commas; card: the eleven tasks of Apple's model card."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Your own questions, instead of --tasks: a .jsonl, .json or .parquet file with image, question and "
            "answer, a folder with such files, or one saved by Hugging Face's datasets."
        ),
    ] = None,
    metric: Annotated[MetricName, typer.Option(help="Metric for answers to --data.")] = MetricName.exact,
    suffix: Annotated[
        str | None,
        typer.Option(help="Line to add to each question of --data, such as 'Answer with a single word.'"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer to --data.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many samples of each task.")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Questions answered together. A killed run loses at most so many answers.")
    ] = 16,
    engine: options.Engine = options.EngineName.transformers,
    precision: options.Precision = None,
    include: Annotated[Path | None, typer.Option(help="Folder with YAML files of additional lmms-eval tasks.")] = None,
    page: Annotated[
        bool | None,
        typer.Option(
            "--page/--no-page", help="Save thumbnails of the images for the report's page. Default: only with --data."
        ),
    ] = None,
    first_token: Annotated[
        bool, typer.Option("--first-token/--no-first-token", help="Also measure the time to the first token.")
    ] = True,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DtypeName.auto,
    size: options.Size = None,
    do_exif_transpose: options.ExifTranspose = True,
    alpha_background: options.AlphaBackground = "white",
    max_pixels: options.MaxPixels = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Evaluate a checkpoint on the model card's benchmarks or on your own questions.

    Each answer is saved when it ends. To resume a run that was killed or stopped, repeat the command. Answers of
    another checkpoint or with other settings are not reused. The benchmarks are downloaded from the hub.

    Examples:

        fastvlm eval apple/FastVLM-0.5B --tasks chartqa,docvqa_val -o results

        fastvlm eval apple/FastVLM-0.5B --data questions.jsonl -o results
    """
    from ..evaluation.eval_run import EvaluationOptions
    from ..evaluation.eval_run import evaluate as run_evaluation
    from .asking import check_model, engine_settings
    from .model_sources import licence_notice

    if (tasks is None) == (data is None):
        raise UserError("give either --tasks, such as card, or --data, a file or folder of your own questions.")
    config = check_model(engine, model)
    chosen = engine_settings(engine, precision, device, dtype, size)

    def loaded() -> None:
        if (message := licence_notice(model, config)) and not is_quiet():
            typer.echo(message, file=errors)

    errors = sys.stderr  # the evaluation redirects the output of other libraries to a file
    with progress_bar("answering", "questions", errors) as show:
        run = run_evaluation(
            model,
            output,
            EvaluationOptions(
                tasks=() if tasks is None else tuple(name.strip() for name in tasks.split(",") if name.strip()),
                include=include,
                data=data,
                metric=metric.value,
                suffix=suffix,
                max_new_tokens=max_new_tokens,
                limit=limit,
                do_exif_transpose=do_exif_transpose,
                alpha_background=alpha_background,
                max_pixels=max_pixels,
                engine=engine.value,
                engine_options=chosen,
                batch_size=batch_size,
                images=page,
                time_first_token=first_token,
            ),
            progress=show,
            reading=show.reading,
            loaded=loaded,
        )
    _tell(run, output)


def _tell(run: "EvaluationRun", out: Path) -> None:
    width = max(len(name) for name in run.tasks)
    for name, task in run.tasks.items():
        typer.echo(f"{name:{width}}  {task.score:6.2f} %  {task.metric}, {task.count:,} rows")
    notice(f"results in {out}")
