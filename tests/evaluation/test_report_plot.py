# SPDX-License-Identifier: Apache-2.0
"""The plot of accuracy against time: an image, made only of runs that have a time."""

from pathlib import Path

import pytest
from PIL import Image

from transformers_fastvlm.evaluation.eval_plots import write_plot
from transformers_fastvlm.evaluation.report import make_report
from transformers_fastvlm.evaluation.results import EvaluationRun, Sample, TaskResult

pytest.importorskip("matplotlib", reason="the plot needs matplotlib")


def run_of(first: float | None) -> EvaluationRun:
    samples = tuple(
        Sample(task="ai2d", doc_id=at, question="q", answers=("a",), given="a", score=at % 2) for at in range(20)
    )
    return EvaluationRun(
        model="m",
        engine="e",
        dtype="d",
        settings={},
        versions={},
        tasks={"ai2d": TaskResult(metric="exact", score=50.0, count=20)},
        seconds={"total": 1, "generate": 1},
        time_to_first_token=first,
        samples=samples,
    )


def test_an_image(tmp_path: Path) -> None:
    report = make_report({"$one$": run_of(0.2), "two": run_of(0.4), "three": run_of(None)})
    file = write_plot(report, tmp_path / "plot.png")
    assert file is not None
    with Image.open(file) as image:
        image.load()
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24) or []}
        assert image.width == 1200 and {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x66, 0x66, 0x66)} <= colours


def test_none_without_a_time(tmp_path: Path) -> None:
    assert write_plot(make_report({"three": run_of(None)}), tmp_path / "plot.png") is None
    assert not (tmp_path / "plot.png").exists()
