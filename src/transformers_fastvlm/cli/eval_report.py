# SPDX-License-Identifier: Apache-2.0
"""`fastvlm eval-report`: evaluations beside Apple's model card and beside each other."""

import enum
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints.published import SIZES
from . import options
from .cli_errors import UserError, notice, reports_errors
from .text_tables import print_table

__all__ = ["eval_report"]


class CardName(enum.StrEnum):
    """Values of --card."""

    auto = "auto"
    none = "none"
    small, medium, large = SIZES


@reports_errors
def eval_report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Directories of fastvlm eval; the others are compared with the first."),
    ],
    card: Annotated[
        CardName,
        typer.Option(help="Size whose figures on Apple's model card stand beside; auto: what the model's name says."),
    ] = CardName.auto,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for report.json, report.md, accuracy_by_time.png and answers.html."),
    ] = None,
    page_samples: Annotated[
        int, typer.Option(min=0, help="Most questions of each task on the page; 0 for no page.")
    ] = 50,
    plot: Annotated[
        bool, typer.Option(help="Draw accuracy against the time to the first token, which needs matplotlib.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Put scores beside Apple's model card, with the difference and its confidence interval.

    Example: fastvlm eval-report results/mine results/int8 --card 0.5B --out report
    """
    from ..checkpoints.published import published_size
    from ..evaluation.eval_plots import plot_points, write_plot
    from ..evaluation.page import write_page
    from ..evaluation.report import make_report, markdown, notes, run_names, tables
    from ..evaluation.results import read_run
    from ..storage.atomic_files import write_lines

    if out is not None and plot and find_spec("matplotlib") is None:
        plot = False
        notice('no plot: it needs matplotlib: pip install "transformers-fastvlm[eval]".')
    loaded = [read_run(directory) for directory in runs]
    names = run_names(loaded, [str(directory) for directory in runs])
    if len(set(names)) < len(names):
        raise UserError(f"a run is named twice: {', '.join(map(str, runs))}. Name each directory once.")
    named = dict(zip(names, loaded, strict=True))
    sizes = {
        name: None if card == CardName.none else published_size(run.model) if card == CardName.auto else card.value
        for name, run in named.items()
    }
    report = make_report(named, sizes, seed=seed)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        written = [out / "report.json", out / "report.md"]
        write_lines(written[0], [json.dumps(report, indent=2)])
        write_lines(written[1], [markdown(report).rstrip("\n")])
        if plot:
            if file := write_plot(report, out / "accuracy_by_time.png"):
                written.append(file)
            else:
                notice("no plot: no run has a time to the first token, or those that have share no task.")
        if page_samples:
            written.append(out / "answers.html")
            directories = dict(zip(names, runs, strict=True))
            pages = {name: (run, directories[name]) for name, run in named.items()}
            shown = write_page(pages, written[-1], page_samples)
            notice(f"the page has {shown.questions} of {shown.of} questions (--page-samples).")
        for file in written:
            notice(f"wrote {file}")
        left_out = [run["name"] for run in report["runs"] if run["time_to_first_token"] is None]
        if plot and left_out and plot_points(report)[0]:
            notice(f"without a time to the first token and so not in the plot: {', '.join(left_out)}.")
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for title, columns, rows in tables(report):
        print_table(title, columns, rows)
        typer.echo()
    if card == CardName.auto and not any(sizes.values()):
        notice("no model's name has a size of the card; --card 0.5B, 1.5B or 7B puts its figures beside the scores.")
    for note in notes(report):
        notice(note)
