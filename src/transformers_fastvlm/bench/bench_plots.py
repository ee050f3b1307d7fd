# SPDX-License-Identifier: Apache-2.0
"""Plots of a record: accuracy against time, latency against resolution, and where the time goes."""

import os
from pathlib import Path
from typing import Any

from .._optional import needs
from ..checkpoints.published import MODEL_CARD_SIDE, PAPER_ENCODER_MS, PAPER_SOURCE, mean_accuracy
from .bench_run import PARTS
from .cases import NATIVE, SIZES

__all__ = ["write_plots"]

_STYLE = Path(__file__).parents[1] / "plots.mplstyle"
_ROW, _LEAST_HEIGHT = 0.45, 2.6


def write_plots(record: dict[str, Any], directory: str | os.PathLike[str]) -> list[Path]:
    """Write the plots of a record of `run` or `run_encoders` as PNG files.

    - `where_time_goes.png`: the parts of the time to the first token, one bar for each case;
    - `latency_by_resolution.png`: the encoder's time by resolution, on Apple's GPU with the paper's curve;
    - `accuracy_by_time.png`: the mean accuracy of Apple's model card against the time to the first token, for models
      measured at the card's resolution.

    Args:
        directory: created if missing; existing files of these names are replaced.

    Returns:
        The written files.

    Raises:
        ImportError: matplotlib is missing.
    """
    with needs("matplotlib", "A plot", 'pip install "transformers-fastvlm[bench]"'):
        import matplotlib.style
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    drawn = {"latency_by_resolution.png": _latency}
    if record["kind"] == "models":
        drawn = {"where_time_goes.png": _where_time_goes, **drawn, "accuracy_by_time.png": _accuracy}
    written = []
    with matplotlib.style.context(_STYLE):
        for name, draw in drawn.items():
            if (figure := draw(record)) is not None:
                figure.savefig(out / name)
                written.append(out / name)
    return written


def _where_time_goes(record: dict[str, Any]) -> Any:
    results = record["results"]
    figure, axes = _titled("Where the time to the first token goes", record, 1.6 + _ROW * len(results))
    longest = max(result["seconds"]["first_token"]["median"] for result in results)
    for row, result in enumerate(results):
        left = 0.0
        for number, part in enumerate(PARTS):
            seconds = result["seconds"].get(part, {"median": 0.0})["median"]
            axes.barh(row, seconds, left=left, color=f"C{number}", label=part if row == 0 else None, height=0.7)
            left += seconds
        whole = result["seconds"]["first_token"]["median"]
        axes.text(max(left, whole) + 0.01 * longest, row, _seconds(whole), va="center")
    axes.set(xlim=(0, 1.12 * longest), xlabel="seconds to the first token, medians")
    axes.set_yticks(range(len(results)), [_label(result, results) for result in results])
    axes.invert_yaxis()
    axes.grid(False)
    figure.legend(loc="outside lower center", ncols=len(PARTS))
    return figure


def _latency(record: dict[str, Any]) -> Any:
    encoders = record["kind"] == "encoders"
    curves: dict[str, list[tuple[int, float, float, float]]] = {}
    for result in record["results"]:
        if not encoders and (result["resolution"] is None or "encode" not in result["seconds"]):
            continue
        seconds = result["seconds"] if encoders else result["seconds"]["encode"]
        median, low, high = (1000 * seconds[key] / result["batch"] for key in ("median", "q1", "q3"))
        curves.setdefault(_series(result["model"], result), []).append((result["resolution"], median, low, high))
    if not curves:
        return None
    figure, axes = _titled("Encoder's time by resolution (medians and quartiles)", record)
    for name, points in curves.items():
        side, median, low, high = zip(*sorted(points), strict=True)
        errors = [[m - q for m, q in zip(median, low, strict=True)], [q - m for m, q in zip(median, high, strict=True)]]
        axes.errorbar(side, median, errors, marker="o", label=name)
    paper = PAPER_ENCODER_MS if record["options"]["device"] == "mps" else {}  # measured on Apple's chips
    if paper:
        style = {"color": "#666666", "linestyle": "--", "marker": "s", "label": f"FastViTHD, {PAPER_SOURCE}"}
        axes.plot([*paper], [*paper.values()], **style)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="height and width in pixels", ylabel="encoder, milliseconds an image")
    sides = sorted({point[0] for points in curves.values() for point in points} | set(paper))
    # If two ticks are too close for their labels, only the first is labelled.
    shown: list[int] = []
    for pixels in sides:
        if not shown or pixels >= 1.1 * shown[-1]:
            shown.append(pixels)
    axes.set_xticks(sides, [str(pixels) if pixels in shown else "" for pixels in sides])
    axes.minorticks_off()
    axes.legend()
    return figure


def _accuracy(record: dict[str, Any]) -> Any:
    """Return the plot, or None if no published size was measured at the model card's resolution."""
    series: dict[str, list[tuple[float, float, str]]] = {}
    for result in record["results"]:
        if result["source"] in SIZES and result["resolution"] == MODEL_CARD_SIDE and result["kind"] != "other":
            kind = (
                "native fast_vlm"
                if result["kind"] == "native"
                else "this package, fused"
                if result["fused"]
                else "this package"
            )
            time = result["seconds"]["first_token"]["median"]
            point = (time, mean_accuracy(result["source"]), result["source"])
            series.setdefault(_series(kind, result), []).append(point)
    if not series:
        return None
    figure, axes = _titled("Published accuracy against measured time", record)
    for index, (name, points) in enumerate(series.items()):
        times, means, sizes = zip(*sorted(points), strict=True)
        (line,) = axes.plot(times, means, marker="o", label=name)
        for *at, size in zip(times, means, sizes, strict=True):
            offset = (6, -12 - 11 * (index % 2))
            axes.annotate(size, at, textcoords="offset points", xytext=offset, color=line.get_color())
    axes.margins(0.18, 0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"seconds to the first token at {MODEL_CARD_SIDE} px, measured, medians")
    axes.set_ylabel("mean of 11 tasks, percent,\nfrom Apple's model card (not measured here)")
    axes.legend()
    return figure


def _series(name: str, result: dict[str, Any]) -> str:
    return f"{name}, {result['dtype']}" + (f", batch {result['batch']}" if result["batch"] > 1 else "")


def _seconds(seconds: float) -> str:
    """Return seconds with as many digits after the point for all times of one size."""
    return f"{seconds:.{2 if seconds < 10 else 1 if seconds < 100 else 0}f} s"


def _label(result: dict[str, Any], results: list[dict[str, Any]]) -> str:
    names = {"fastvlm": "this package, ", NATIVE: "native fast_vlm, "}
    name = result["model"].removesuffix(" native") if result["kind"] == NATIVE else result["model"]
    label = (
        names.get(result["kind"], "") + name + ("" if result["resolution"] is None else f"\n{result['resolution']} px")
    )
    if len({other["dtype"] for other in results}) > 1:
        label += f", {result['dtype']}"
    if len({other["batch"] for other in results}) > 1:
        label += f", batch {result['batch']}"
    return label


def _titled(title: str, record: dict[str, Any], height: float = 5.0) -> tuple[Any, Any]:
    """Return an empty figure and its axes, with a title that names the device, threads and dtypes."""
    from matplotlib.figure import Figure

    figure = Figure((8.0, max(_LEAST_HEIGHT, height)))
    machine, options = record["machine"], record["options"]
    threads = f"{options['threads']} thread" + ("" if options["threads"] == 1 else "s")
    place = machine.get("gpu") or f"{machine['cpu']}, {threads}"
    axes = figure.subplots()
    axes.set_title(f"{title}\n{place}, {', '.join(options['dtypes'])}")
    return figure, axes
