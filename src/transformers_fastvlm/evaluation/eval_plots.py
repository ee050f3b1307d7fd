# SPDX-License-Identifier: Apache-2.0
"""Accuracy against the time to the first token, a point a run, like the plot on Apple's model card."""

import os
from pathlib import Path
from typing import Any

from .._optional import needs
from ..checkpoints.published import MODEL_CARD, PAPER_FIRST_TOKEN_MS

__all__ = ["plot_points", "write_plot"]

# Distinguishable for colour-blind readers (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_CARD_COLOUR = "#666666"


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
        points.append(
            {
                "name": run["name"],
                "milliseconds": 1000 * run["time_to_first_token"],
                "score": score,
                "interval": [score - down, score + up],
            }
        )
    card = [
        {
            "name": f"card {size}",
            "milliseconds": milliseconds,
            "score": sum(MODEL_CARD[name][size] for name in on_card.values()) / len(on_card),
            "interval": None,
        }
        for size, milliseconds in PAPER_FIRST_TOKEN_MS.items()
        if on_card
    ]
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
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    points, card, tasks = plot_points(report)
    if not points:
        return None
    figure = Figure((8.0, 5.0), layout="constrained")
    axes = figure.subplots()
    if card:
        axes.plot(
            [point["milliseconds"] for point in card],
            [point["score"] for point in card],
            color=_CARD_COLOUR,
            linestyle="--",
            marker="s",
            label="Apple's model card; times of the paper, on an M1 Max",
        )
    for index, point in enumerate(points):
        low, high = point["interval"]
        axes.errorbar(
            [point["milliseconds"]],
            [point["score"]],
            [[point["score"] - low], [high - point["score"]]],
            color=_COLOURS[index % len(_COLOURS)],
            marker="o",
            capsize=3,
            linestyle="none",
            label=_plain(point["name"]),
        )
    for point in (*card, *points):
        axes.annotate(
            _plain(point["name"]),
            (point["milliseconds"], point["score"]),
            textcoords="offset points",
            xytext=(6, -13),
            fontsize=9,
        )
    axes.margins(0.15, 0.15)
    axes.set_xscale("log")
    plain = LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(plain)
    axes.set_xlabel("milliseconds to the first token (log scale)")
    what = _plain(tasks[0]) if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
    axes.set_ylabel(f"{what}, percent")
    axes.set_title("Accuracy against time to the first token", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    out = Path(file)
    figure.savefig(out, dpi=150)
    return out


def _plain(text: str) -> str:
    """Return a text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
