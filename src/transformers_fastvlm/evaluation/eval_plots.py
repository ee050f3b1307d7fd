# SPDX-License-Identifier: Apache-2.0
"""Accuracy against the time to the first token, a point a run, like the plot on Apple's model card."""

import os
from pathlib import Path
from typing import Any

from .._optional import needs
from ..checkpoints.published import MODEL_CARD, PAPER_FIRST_TOKEN_MS

__all__ = ["plot_points", "write_plot"]

_STYLE = Path(__file__).parents[1] / "plots.mplstyle"


def plot_points(report: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Return the points of the runs, those of the card, and the tasks that they are means of.

    The tasks are those that all runs with a time have in common, and of them those on the card if there are any: means
    of different tasks would not be comparable. A point has `name`, `milliseconds`, `score` and `interval` (None for the
    card's).

    Args:
        report: from `make_report`.
    """
    timed = [run for run in report["runs"] if run["time_to_first_token"] is not None]
    if not timed:
        return [], [], []
    rows = [{row["task"]: row for row in run["tasks"]} for run in timed]
    common = [task for task in rows[0] if all(task in other for other in rows)]
    on_card = {task: rows[0][task]["card_task"] for task in common if rows[0][task]["card_task"]}
    tasks = [*on_card] or common
    if not tasks:
        return [], [], []
    points = []
    for run, own in zip(timed, rows, strict=True):
        score = sum(own[task]["score"] for task in tasks) / len(tasks)
        # Tasks are independent, so the half widths add up as the sides of right triangles do.
        down, up = (
            sum((own[task]["interval"][end] - own[task]["score"]) ** 2 for task in tasks) ** 0.5 / len(tasks)
            for end in (0, 1)
        )
        milliseconds = 1000 * run["time_to_first_token"]
        interval = [score - down, score + up]
        points.append({"name": run["name"], "milliseconds": milliseconds, "score": score, "interval": interval})
    card: list[dict[str, Any]] = []
    for size, milliseconds in PAPER_FIRST_TOKEN_MS.items() if on_card else ():
        score = sum(MODEL_CARD[name][size] for name in on_card.values()) / len(on_card)
        card.append({"name": f"card {size}", "milliseconds": milliseconds, "score": score, "interval": None})
    return points, card, tasks


def write_plot(report: dict[str, Any], file: str | os.PathLike[str]) -> Path | None:
    """Draw accuracy against the time to the first token, as a PNG file.

    The runs' points have the interval of their mean. The card's points are named as such: their accuracies are those
    of Apple's model card, their times the paper's, from another machine.

    Args:
        report: from `make_report`.
        file: replaced if it is there.

    Returns:
        The file; None if no run has a time to the first token, or they have no task in common.

    Raises:
        ImportError: matplotlib is missing.
    """
    with needs("matplotlib", "the plot", 'pip install "transformers-fastvlm[eval]"'):
        import matplotlib.style
    points, card, tasks = plot_points(report)
    if not points:
        return None
    with matplotlib.style.context(_STYLE):
        _figure(points, card, tasks).savefig(file)
    return Path(file)


def _figure(points: list[dict[str, Any]], card: list[dict[str, Any]], tasks: list[str]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure((8.0, 5.0))
    axes = figure.subplots()
    if card:
        label = "Apple's model card; times of the paper, on an M1 Max"
        milliseconds, scores = ([point[key] for point in card] for key in ("milliseconds", "score"))
        axes.plot(milliseconds, scores, color="#666666", linestyle="--", marker="s", label=label)
    for point in points:
        low, high = point["interval"]
        errors = [[point["score"] - low], [high - point["score"]]]
        label = _plain(point["name"])
        axes.errorbar([point["milliseconds"]], [point["score"]], errors, marker="o", linestyle="none", label=label)
    for point in (*card, *points):
        at = point["milliseconds"], point["score"]
        axes.annotate(_plain(point["name"]), at, textcoords="offset points", xytext=(6, -13))
    axes.margins(0.15, 0.15)
    axes.set_xscale("log")
    plain = LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(plain)
    axes.set_xlabel("milliseconds to the first token (log scale)")
    axes.set_ylabel(f"{_plain(tasks[0]) if len(tasks) == 1 else f'mean of {len(tasks)} tasks'}, percent")
    axes.set_title("Accuracy against time to the first token")
    axes.grid(which="both")
    axes.legend()
    return figure


def _plain(text: str) -> str:
    """Return a text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
