# SPDX-License-Identifier: Apache-2.0
"""`fastvlm eval-report`: compare evaluations with Apple's model card and with each other."""

import enum
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints.published import SIZES
from . import options
from .cli_errors import UserError, notice, reports_errors, warn
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
        typer.Argument(
            metavar="RUN...", help="Output directories of fastvlm eval; later ones are compared with the first."
        ),
    ],
    card: Annotated[
        CardName,
        typer.Option(help="Model size of Apple's model card to compare with; auto: from the model's name."),
    ] = CardName.auto,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Directory for report.json, report.md, accuracy_by_time.png and answers.html."
        ),
    ] = None,
    page_samples: Annotated[
        int, typer.Option(min=0, help="Maximum number of questions of each task on the page; 0 for no page.")
    ] = 50,
    plot: Annotated[
        bool, typer.Option(help="Plot accuracy against the time to the first token; needs matplotlib.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the bootstrap.")] = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compare scores with Apple's model card, with the confidence interval of each difference.

    Examples:

        fastvlm eval-report results --card 0.5B

        fastvlm eval-report results/mine results/int8 --card 0.5B -o report
    """
    from ..checkpoints.published import published_size
    from ..evaluation.eval_plots import plot_points, write_plot
    from ..evaluation.page import write_page
    from ..evaluation.report import make_report, markdown, notes, run_names, tables
    from ..evaluation.results import read_run
    from ..storage.atomic_files import write_lines

    if output is not None and plot and find_spec("matplotlib") is None:
        plot = False
        warn('no plot: it needs matplotlib: pip install "transformers-fastvlm[eval]".')
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
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        written = [output / "report.json", output / "report.md"]
        write_lines(written[0], [json.dumps(report, indent=2)])
        write_lines(written[1], [markdown(report).rstrip("\n")])
        if plot:
            if file := write_plot(report, output / "accuracy_by_time.png"):
                written.append(file)
            else:
                notice("no plot: no run has a time to the first token, or the runs with one share no task.")
        if page_samples:
            written.append(output / "answers.html")
            directories = dict(zip(names, runs, strict=True))
            pages = {name: (run, directories[name]) for name, run in named.items()}
            shown = write_page(pages, written[-1], page_samples)
            notice(f"the page has {shown.questions} of {shown.of} questions (--page-samples).")
        for file in written:
            notice(f"wrote {file}")
        left_out = [run["name"] for run in report["runs"] if run["time_to_first_token"] is None]
        if plot and left_out and plot_points(report)[0]:
            notice(f"not in the plot, as they have no time to the first token: {', '.join(left_out)}.")
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for title, columns, rows in tables(report):
        print_table(title, columns, rows)
        typer.echo()
    if card == CardName.auto and not any(sizes.values()):
        notice("no model's name has a size of the card; use --card 0.5B, 1.5B or 7B to compare with the card's scores.")
    for note in notes(report):
        notice(note)
