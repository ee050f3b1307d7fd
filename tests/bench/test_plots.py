# SPDX-License-Identifier: Apache-2.0
"""The plots of a record: which there are, and that they are pictures that show what they should."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transformers_fastvlm.bench import Options, write_plots
from transformers_fastvlm.bench.bench_plots import _accuracy, _latency, _seconds, _where_time_goes
from transformers_fastvlm.checkpoints.published import mean_accuracy

pytest.importorskip("matplotlib", reason="plots need matplotlib")

PARTS = ("preprocess", "encode", "project", "prefill")


def spread(value: float) -> dict[str, Any]:
    return {"median": value, "q1": 0.9 * value, "q3": 1.2 * value, "min": 0.9 * value, "max": 1.2 * value, "runs": 5}


def result(model: str, side: int, kind: str = "fastvlm", factor: float = 1.0) -> dict[str, Any]:
    times = [factor * seconds for seconds in (0.1, 1e-6 * side**2, 0.01, 0.5)]
    seconds = {part: spread(time) for part, time in zip(PARTS, times, strict=True)}
    label = f"{model} native" if kind == "native" else model
    return {
        "model": label,
        "kind": kind,
        "source": model,
        "resolution": side,
        "dtype": "float32",
        "batch": 1,
        "fused": False,
        "seconds": seconds | {"first_token": spread(sum(times))},
    }


def record(*results: dict[str, Any]) -> dict[str, Any]:
    options = Options(threads=1).as_dict()
    return {"kind": "models", "machine": {"cpu": "a processor"}, "options": options, "results": list(results)}


def texts(figure: Any) -> str:
    import matplotlib.text

    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_files_are_pictures(tmp_path: Path) -> None:
    results = (
        result("0.5B", 512),
        result("0.5B", 1024),
        result("0.5B", 1024, "native", 2),
        result("7B", 1024, factor=5),
    )
    files = write_plots(record(*results), tmp_path / "plots")
    assert [file.name for file in files] == [
        "where_time_goes.png",
        "latency_by_resolution.png",
        "accuracy_by_time.png",
    ]
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert image.width >= 1000 and len(image.convert("RGB").getcolors(2**24)) > 5


def test_bars_are_as_long_as_the_medians() -> None:
    figure = _where_time_goes(record(result("0.5B", 1024), result("0.5B", 1024, "native", 2)))
    patches = [patch for patch in figure.axes[0].patches if patch.get_width() > 0]
    assert [round(patch.get_width(), 6) for patch in patches[:4]] == [0.1, 1.048576, 0.01, 0.5]
    assert round(patches[7].get_x() + patches[7].get_width(), 5) == round(2 * 1.658576, 5)
    assert "native fast_vlm, 0.5B\n1024 px" in texts(figure) and "3.32 s" in texts(figure)


def test_the_papers_curve_is_shown_only_for_the_device_it_was_measured_on() -> None:
    plain = record(result("0.5B", 512), result("0.5B", 1024))
    assert "paper" not in texts(_latency(plain))
    plain["options"]["device"] = "mps"
    figure = _latency(plain)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    paper = lines["FastViTHD, paper, table 10 (M1 Max, Core ML)"]
    assert [*zip(paper.get_xdata(), paper.get_ydata(), strict=True)] == [(256, 6.8), (768, 54.8), (1024, 116.3)]
    assert "0.5B, float32" in texts(figure)


def test_accuracies_only_of_what_was_measured_at_the_model_cards_resolution() -> None:
    assert _accuracy(record(result("0.5B", 512))) is None
    other = result("my-model", 1024)
    assert _accuracy(record(other)) is None
    figure = _accuracy(record(result("0.5B", 1024), result("7B", 1024), other, result("1.5B", 768)))
    shown = texts(figure)
    assert "model card" in shown and "0.5B" in shown and "7B" in shown and "1.5B" not in shown
    ((x, y),) = [(line.get_xdata(), line.get_ydata()) for line in figure.axes[0].get_lines()]
    assert list(y) == [mean_accuracy("0.5B"), mean_accuracy("7B")] and len(x) == 2
    assert mean_accuracy("0.5B") == pytest.approx(65.8, abs=0.05)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1.716, "1.72 s"), (11.0, "11.0 s"), (12.94, "12.9 s"), (243.6, "244 s")]
)
def test_times_of_one_size_have_the_same_digits(seconds: float, shown: str) -> None:
    assert _seconds(seconds) == shown
