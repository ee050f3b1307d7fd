# SPDX-License-Identifier: Apache-2.0
"""Comparison of evaluations with Apple's model card and with each other, as a record, Markdown, and table rows."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from ..checkpoints.published import MODEL_CARD, MODEL_CARD_TASKS, SIZES
from .bootstrap import CONFIDENCE, RESAMPLES, SEED, interval, resampled_means
from .results import EvaluationRun, Sample

__all__ = ["FORMAT", "Table", "make_report", "markdown", "run_names", "tables"]

FORMAT = 1
"""Version of the record's format; incompatible changes increase it."""

CARD_ROUNDING = 0.05
"""Rounding error of the card's figures, which have one decimal."""

_NOTICEABLE = 0.05
"""Difference in points between the harness's score and the mean of the samples above which a note is added."""

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, columns and rows; the first column is aligned left."""


def run_names(runs: Sequence[EvaluationRun], directories: Sequence[str]) -> list[str]:
    """Return a short unique name for each run: the model's name, with engine, dtype or directory where it is needed."""
    names = [PurePath(run.model).name or run.model for run in runs]
    for details in ([f"{run.engine}, {run.dtype}" for run in runs], list(directories)):
        counts = Counter(names)
        names = [
            f"{name} ({detail})" if counts[name] > 1 else name for name, detail in zip(names, details, strict=True)
        ]
    return names


def make_report(
    runs: Mapping[str, EvaluationRun],
    cards: Mapping[str, str | None] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, Any]:
    """Compare runs with Apple's model card, and every further run with the first one.

    A difference is `outside` if the card's figure, up to its rounding, lies outside the bootstrap interval of the run's
    score. The card's figure has no interval. Runs are compared with a paired bootstrap on their common samples, which
    detects smaller differences.

    Args:
        runs: by display name.
        cards: by the same names, "0.5B", "1.5B" or "7B" for runs to compare with the card's figures of that size.
        resamples: number of bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        The content of `report.json`: `confidence`, `resamples`, `seed` and `runs`, each with its model, settings,
        versions, seconds, `tasks`, `mean` and `against_first`. Scores and intervals are in percent, differences in
        points.

    Raises:
        ValueError: there are no runs, or the card does not have a size.
    """
    if not runs:
        raise ValueError("there are no runs to report; expected one or more.")
    first = next(iter(runs))
    entries = []
    for name, run in runs.items():
        size = (cards or {}).get(name)
        if size is not None and size not in SIZES:
            raise ValueError(f"the card has no size {size!r}; expected one of {', '.join(SIZES)}.")
        rows, means = [], {}
        for task in run.tasks:
            row, means[task] = _task(run, task, size, resamples, seed)
            rows.append(row)
        entries.append(
            {
                "name": name,
                "model": run.model,
                "engine": run.engine,
                "dtype": run.dtype,
                "settings": dict(run.settings),
                "versions": dict(run.versions),
                "seconds": dict(run.seconds),
                "time_to_first_token": run.time_to_first_token,
                "card": size,
                "tasks": rows,
                "mean": _mean(rows, means),
                "against_first": [] if name == first else _paired(runs[first], run, resamples, seed),
            }
        )
    return {"format": FORMAT, "confidence": CONFIDENCE, "resamples": resamples, "seed": seed, "runs": entries}


def _task(run: EvaluationRun, task: str, size: str | None, resamples: int, seed: int) -> tuple[dict[str, Any], Any]:
    """Return a task's row and its resampled means, in percent, shifted to the harness's score."""
    result = run.tasks[task]
    scores = [100 * sample.score for sample in run.samples_of(task)]
    mean = float(np.mean(scores))
    means = np.clip(resampled_means(scores, task, resamples, seed) + (result.score - mean), 0, 100)
    card_task = MODEL_CARD_TASKS.get(task)
    card = MODEL_CARD[card_task][size] if size is not None and card_task is not None else None
    row = {
        "task": task,
        "card_task": card_task,
        "metric": result.metric,
        "count": result.count,
        "mean_of_samples": round(mean, 4),
        **_beside(result.score, means, card),
    }
    return row, means


def _mean(rows: list[dict[str, Any]], means: dict[str, Any]) -> dict[str, Any] | None:
    """Return the mean over the tasks that are on the card, or over all tasks if none is; None for a single task."""
    chosen = [row for row in rows if row["card"] is not None] or rows
    if len(chosen) < 2:
        return None
    score = float(np.mean([row["score"] for row in chosen]))
    cards = [row["card"] for row in chosen if row["card"] is not None]
    resampled = np.mean([means[row["task"]] for row in chosen], axis=0)
    return {"tasks": len(chosen), **_beside(score, resampled, float(np.mean(cards)) if cards else None)}


def _beside(score: float, means: Any, card: float | None) -> dict[str, Any]:
    low, high = interval(means)
    row: dict[str, Any] = {"score": round(score, 4), "interval": [round(low, 4), round(high, 4)], "card": card}
    if card is None:
        return row | {"difference": None, "difference_interval": None, "outside": None}
    row["card"] = round(card, 4)
    row["difference"] = round(score - card, 4)
    row["difference_interval"] = [round(low - card, 4), round(high - card, 4)]
    row["outside"] = bool(card - CARD_ROUNDING > high or card + CARD_ROUNDING < low)
    return row


def _paired(first: EvaluationRun, run: EvaluationRun, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Return the differences between a run and the first one on their common questions."""
    rows = []
    for task in run.tasks:
        base = {_key(sample): sample for sample in first.samples_of(task)}
        pairs = [(base[_key(sample)], sample) for sample in run.samples_of(task) if _key(sample) in base]
        if not pairs:
            continue
        differences = [100 * (own.score - other.score) for other, own in pairs]
        low, high = interval(resampled_means(differences, task, resamples, seed))
        rows.append(
            {
                "task": task,
                "count": len(pairs),
                "difference": round(float(np.mean(differences)), 4),
                "interval": [round(low, 4), round(high, 4)],
                "outside": bool(low > 0 or high < 0),
                "other_answers": sum(other.given != own.given for other, own in pairs),
            }
        )
    return rows


def _key(sample: Sample) -> tuple[int | str, str, tuple[str, ...]]:
    return sample.doc_id, sample.question, sample.answers


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """Yield a table for each run, compared with the card, and one for each further run, compared with the first."""
    percent = f"{100 * report['confidence']:g} % interval"
    for run in report["runs"]:
        size = run["card"]
        card = f"card {size}" if size else "card"
        columns: tuple[str, ...] = ("task", "metric", "samples", card, "score", percent, "difference", "")
        rows: list[tuple[str, ...]] = [_row(row, row["task"], row["metric"], str(row["count"])) for row in run["tasks"]]
        if run["mean"]:
            rows.append(_row(run["mean"], f"mean of {run['mean']['tasks']}", "", ""))
        if not size:  # without a card, leave out its columns
            columns = (*columns[:3], *columns[4:6])
            rows = [(*row[:3], *row[4:6]) for row in rows]
        yield run["name"], columns, rows
    first = report["runs"][0]["name"]
    for run in report["runs"]:
        if run["against_first"]:
            paired: list[tuple[str, ...]] = [
                (
                    row["task"],
                    str(row["count"]),
                    f"{row['difference']:+.1f}",
                    _range(row["interval"], "+.1f"),
                    _verdict(row["difference"], row["outside"], "no clear difference"),
                    str(row["other_answers"]),
                )
                for row in run["against_first"]
            ]
            columns = ("task", "samples", "difference", percent, "", "other answers")
            yield f"{run['name']} against {first}, the same questions", columns, paired


def _row(row: dict[str, Any], *start: str) -> tuple[str, ...]:
    score = (f"{row['score']:.1f}", _range(row["interval"], ".1f"))
    if row["card"] is None:
        return (*start, "", *score, "", "")
    verdict = _verdict(row["difference"], row["outside"], "as expected")
    return (*start, f"{row['card']:.1f}", *score, f"{row['difference']:+.1f}", verdict)


def _range(bounds: list[float], form: str) -> str:
    return f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def _verdict(difference: float, outside: bool, otherwise: str) -> str:
    return ("higher" if difference > 0 else "lower") if outside else otherwise


def notes(report: dict[str, Any]) -> list[str]:
    """Return notes to the tables."""
    found = []
    for run in report["runs"]:
        for row in run["tasks"]:
            if abs(row["score"] - row["mean_of_samples"]) > _NOTICEABLE:
                found.append(
                    f"{run['name']}, {row['task']}: the harness's score is {row['score']:.1f}, but the mean of the "
                    f"samples is {row['mean_of_samples']:.1f}; the interval of the mean is shifted to the score."
                )
        unknown = [row["task"] for row in run["tasks"] if run["card"] and row["card"] is None]
        if unknown:
            found.append(f"{run['name']}: the card has no figure for {', '.join(unknown)}.")
    return found


def markdown(report: dict[str, Any]) -> str:
    """Return a report as Markdown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader(__package__, ".")
    # The output is Markdown, not HTML: the filter `cell` escapes untrusted text.
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = _cell
    return environment.get_template("report.md.jinja").render(report, tables=list(tables(report)), notes=notes(report))


def _cell(text: str) -> str:
    """Escape a text so that it cannot end its cell or line, or be read as HTML."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
