# SPDX-License-Identifier: Apache-2.0
"""The report: intervals that are those of the bootstrap, differences from the card, and runs beside each other."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from transformers_fastvlm.checkpoints.published import MODEL_CARD, MODEL_CARD_TASKS, published_size
from transformers_fastvlm.cli import app
from transformers_fastvlm.evaluation.bootstrap import interval, resampled_means
from transformers_fastvlm.evaluation.eval_plots import plot_points
from transformers_fastvlm.evaluation.report import make_report, markdown, notes, run_names, tables
from transformers_fastvlm.evaluation.results import EvaluationRun, Sample, TaskResult, write_run


def run_of(tasks: dict[str, list[float]], model: str = "apple/FastVLM-0.5B", **changes: Any) -> EvaluationRun:
    """Return a run with these scores of samples, 0 to 1, by task."""
    samples = tuple(
        Sample(task=task, doc_id=at, question=f"q{at}", answers=("a",), given=f"{score}", score=score)
        for task, scores in tasks.items()
        for at, score in enumerate(scores)
    )
    results = {
        task: TaskResult(metric="m", score=100 * sum(scores) / len(scores), count=len(scores))
        for task, scores in tasks.items()
    }
    fields: dict[str, Any] = {
        "model": model,
        "engine": "transformers",
        "dtype": "float32",
        "settings": {},
        "versions": {"torch": "2"},
        "tasks": results,
        "seconds": {"total": 2.0, "generate": 1.0},
        "samples": samples,
    }
    return EvaluationRun(**fields | changes)


def shares(right: int, of: int) -> list[float]:
    return [1.0] * right + [0.0] * (of - right)


def test_resampled_means_are_distributed_as_resamples_of_the_values() -> None:
    values = [0.0] * 40 + [0.3] * 10 + [1.0] * 50
    means = resampled_means(values, resamples=20_000)
    draws = np.random.default_rng(1).choice(values, size=(20_000, 100)).mean(1)
    assert means.mean() == pytest.approx(np.mean(values), abs=1e-3)
    assert means.std() == pytest.approx(np.std(values) / 10, rel=0.02)
    assert interval(means) == pytest.approx(interval(draws), abs=0.01)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = random.Random(3)
    held = 0
    for trial in range(300):
        values = [float(rng.random() < 0.7) for _ in range(200)]
        low, high = interval(resampled_means(values, str(trial), resamples=1000))
        held += low <= 0.7 <= high
    assert 0.91 <= held / 300 <= 0.98  # 0.95, with three standard deviations of 300 trials


def test_a_seed_is_repeatable_and_another_task_draws_anew() -> None:
    values = shares(30, 50)
    assert (resampled_means(values, "a") == resampled_means(values, "a")).all()
    assert (resampled_means(values, "a") != resampled_means(values, "b")).any()
    assert (resampled_means(values, "a") != resampled_means(values, "a", seed=1)).any()
    # In parts as at once: many different values are drawn in several goes.
    many = [at / 5000 for at in range(5000)]
    assert resampled_means(many, resamples=1500).std() == pytest.approx(np.std(many) / 5000**0.5, rel=0.1)
    with pytest.raises(ValueError, match="no values"):
        resampled_means([])


def test_differences_from_the_card() -> None:
    # AI2D 68.0 and ChartQA 76.0 for 0.5B: 340 of 500 is the card's figure, 300 of 500 is far below 76.
    report = make_report(
        {"x": run_of({"ai2d": shares(340, 500), "chartqa": shares(300, 500), "own": shares(1, 2)})}, {"x": "0.5B"}
    )
    ai2d, chartqa, own = report["runs"][0]["tasks"]
    assert (ai2d["card"], ai2d["score"], ai2d["difference"], ai2d["outside"]) == (68.0, 68.0, 0.0, False)
    assert (chartqa["card"], chartqa["difference"], chartqa["outside"]) == (76.0, -16.0, True)
    # Half the width of a share's interval: 1.96 * sqrt(p * (1 - p) / n).
    assert chartqa["interval"] == pytest.approx([60 - 4.29, 60 + 4.29], abs=0.3)
    assert chartqa["difference_interval"] == pytest.approx([bound - 76 for bound in chartqa["interval"]])
    assert own["card"] is None and own["outside"] is None and own["card_task"] is None
    mean = report["runs"][0]["mean"]
    assert (mean["tasks"], mean["score"], mean["card"], mean["difference"]) == (2, 64.0, 72.0, -8.0)
    # Of two independent tasks: the root of the summed squares of half their widths.
    widths = [(row["interval"][1] - row["interval"][0]) / 2 for row in (ai2d, chartqa)]
    assert (mean["interval"][1] - mean["interval"][0]) / 2 == pytest.approx(np.hypot(*widths) / 2, rel=0.05)
    assert notes(report) == ["x: the card has no figure for own."]


def test_a_score_that_is_no_mean_of_its_samples_is_noted() -> None:
    run = run_of({"t": shares(5, 10)})
    run = EvaluationRun(**vars(run) | {"tasks": {"t": TaskResult(metric="m", score=60.0, count=10)}})
    report = make_report({"x": run})
    row = report["runs"][0]["tasks"][0]
    assert row["score"] == 60.0 and row["mean_of_samples"] == 50.0
    assert sum(row["interval"]) / 2 == pytest.approx(60.0, abs=2)
    assert "the harness's score is 60.0, but the mean of the samples is 50.0" in notes(report)[0]


def test_runs_are_compared_in_pairs() -> None:
    base = shares(250, 500)
    # Ten answers get worse: far within the interval of either score, and certain in pairs.
    worse = [0.0] * 10 + base[10:]
    report = make_report({"a": run_of({"t": base}), "b": run_of({"t": worse}), "c": run_of({"t": base})})
    assert report["runs"][0]["against_first"] == []
    (row,) = report["runs"][1]["against_first"]
    assert (row["difference"], row["outside"], row["other_answers"], row["count"]) == (-2.0, True, 10, 500)
    assert row["interval"][0] < -2.0 < row["interval"][1] < 0
    (row,) = report["runs"][2]["against_first"]
    assert (row["difference"], row["interval"], row["outside"]) == (0.0, [0.0, 0.0], False)
    worse, same = (rows[0][4] for title, _, rows in tables(report) if " against " in title)
    assert (worse, same) == ("lower", "no clear difference")
    other = EvaluationRun(
        **vars(report_run := run_of({"t": base}))
        | {"samples": tuple(Sample(**vars(one) | {"question": "?"}) for one in report_run.samples)}
    )
    assert make_report({"a": run_of({"t": base}), "b": other})["runs"][1]["against_first"] == []


def test_tables_and_markdown() -> None:
    runs = {"x|y": run_of({"ai2d": shares(340, 500)}), "z": run_of({"ai2d": shares(200, 500)}, time_to_first_token=0.2)}
    report = make_report(runs, {"x|y": "0.5B", "z": None})
    first, second, paired = tables(report)
    assert first[1] == ("task", "metric", "samples", "card 0.5B", "score", "95 % interval", "difference", "")
    assert first[2][0][:5] == ("ai2d", "m", "500", "68.0", "68.0") and first[2][0][6:] == ("+0.0", "as expected")
    assert second[1] == ("task", "metric", "samples", "score", "95 % interval")
    assert paired[0] == "z against x|y, the same questions" and paired[2][0][2] == "-28.0"
    text = markdown(report)
    assert "## x\\|y" in text and "| ai2d | m | 500 | 68.0 | 68.0 |" in text and "200 ms to the first token" in text
    assert "research only" in text
    assert "research only" not in markdown(make_report({"x": run_of({"t": shares(1, 2)})}))


def test_names_tell_runs_apart() -> None:
    one, other = run_of({"t": [1.0]}), run_of({"t": [1.0]}, dtype="bfloat16")
    assert run_names([one], ["d"]) == ["FastVLM-0.5B"]
    assert run_names([one, other], ["d", "e"]) == [
        "FastVLM-0.5B (transformers, float32)",
        "FastVLM-0.5B (transformers, bfloat16)",
    ]
    assert run_names([one, one], ["d", "e"]) == [
        "FastVLM-0.5B (transformers, float32) (d)",
        "FastVLM-0.5B (transformers, float32) (e)",
    ]


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("apple/FastVLM-0.5B", "0.5B"),
        ("checkpoints/llava-fastvithd_7b_stage3/", "7B"),
        ("FastVLM-1.5B-int8", "1.5B"),
        ("my-7B/model", None),
        ("10.5b", None),
        ("1.7B", None),
        ("0.5B-and-7B", None),
    ],
)
def test_size_by_name(model: str, size: str | None) -> None:
    assert published_size(model) == size


def test_the_cards_rows_each_have_a_task() -> None:
    assert list(MODEL_CARD_TASKS.values()) == list(MODEL_CARD) and len(MODEL_CARD) == 11


def test_points_are_means_of_the_same_tasks() -> None:
    runs = {
        "a": run_of({"ai2d": shares(5, 10), "own": shares(10, 10)}, time_to_first_token=0.1),
        "b": run_of({"own": shares(10, 10), "ai2d": shares(6, 10), "chartqa": shares(1, 10)}, time_to_first_token=0.2),
        "c": run_of({"chartqa": shares(1, 10)}),
    }
    points, card, tasks = plot_points(make_report(runs))
    assert tasks == ["ai2d"]
    assert [(point["name"], point["milliseconds"], point["score"]) for point in points] == [
        ("a", 100.0, 50.0),
        ("b", 200.0, 60.0),
    ]
    assert [(point["name"], point["milliseconds"], point["score"]) for point in card] == [
        ("card 0.5B", 166.0, 68.0),
        ("card 1.5B", 233.0, 77.4),
        ("card 7B", 641.0, 83.6),
    ]
    own, card, tasks = plot_points(make_report({"a": run_of({"own": shares(1, 4)}, time_to_first_token=0.1)}))
    assert tasks == ["own"] and card == [] and own[0]["score"] == 25.0
    assert plot_points(make_report({"c": runs["c"]})) == ([], [], [])


def test_command(tmp_path: Path) -> None:
    write_run(tmp_path / "a", run_of({"ai2d": shares(340, 500)}))
    write_run(tmp_path / "b", run_of({"ai2d": shares(300, 500)}, dtype="bfloat16"))
    call = CliRunner().invoke
    words = ["eval-report", str(tmp_path / "a"), str(tmp_path / "b")]
    result = call(app, [*words, "--out", str(tmp_path / "out"), "--no-plot"])
    assert result.exit_code == 0, result.stderr
    assert "card 0.5B" in result.stdout and "-8.0" in result.stdout and "lower" in result.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"report.json", "report.md", "answers.html"}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["runs"][1]["tasks"][0]["outside"] is True
    result = call(app, [*words, "--card", "7B", "--json"])
    assert json.loads(result.stdout)["runs"][0]["tasks"][0]["card"] == 83.6
    result = call(app, ["eval-report", str(tmp_path)])
    assert result.exit_code == 2 and "has no results.json" in result.stderr and "Traceback" not in result.stderr
    result = call(app, [words[0], words[1], words[1]])
    assert result.exit_code == 2 and "a run is named twice" in result.stderr


def test_without_matplotlib_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers_fastvlm.cli.eval_report.find_spec", lambda name: None)
    write_run(tmp_path / "a", run_of({"ai2d": shares(340, 500)}))
    result = CliRunner().invoke(app, ["eval-report", str(tmp_path / "a"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "no plot: it needs matplotlib" in result.stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"report.json", "report.md", "answers.html"}


def test_own_runs_without_a_size_say_so(tmp_path: Path) -> None:
    write_run(tmp_path / "a", run_of({"ai2d": shares(1, 2)}, model="mine"))
    result = CliRunner().invoke(app, ["eval-report", str(tmp_path / "a")])
    assert result.exit_code == 0 and "--card 0.5B" in result.stderr and "card" not in result.stdout
