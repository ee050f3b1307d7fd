# SPDX-License-Identifier: Apache-2.0
"""Pictures of a record: accuracy against time, latency against resolution, and where the time goes."""

import os
from pathlib import Path
from typing import Any

from .._optional import needs
from ..checkpoints.published import MODEL_CARD_SIDE, PAPER_ENCODER_MS, PAPER_SOURCE, mean_accuracy
from .bench_run import PARTS
from .cases import SIZES

__all__ = ["write_plots"]

# Distinguishable for colour-blind readers (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_WIDTH, _DPI = 8.0, 150
_ROW, _LEAST_HEIGHT = 0.45, 2.6


def write_plots(record: dict[str, Any], directory: str | os.PathLike[str]) -> list[Path]:
    """Write the plots that a record of `run` or `run_encoders` has figures for, as PNG files.

    - `where_time_goes.png`: the parts of the time to the first token, a bar a case;
    - `latency_by_resolution.png`: the encoder's time by resolution, with the paper's curve;
    - `accuracy_by_time.png`: the mean accuracy of Apple's model card against the time to the first token; only sizes
      that were measured at the model card's resolution.

    Args:
        directory: made where it is missing; files of these names in it are replaced.

    Returns:
        The files that were written.

    Raises:
        ImportError: matplotlib is missing.
    """
    with needs("matplotlib", "A plot", 'pip install "transformers-fastvlm[bench]"'):
        from matplotlib.figure import Figure  # noqa: F401
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    models = record["kind"] == "models"
    drawn = {
        "where_time_goes.png": _where_time_goes(record) if models else None,
        "latency_by_resolution.png": _latency(record),
        "accuracy_by_time.png": _accuracy(record) if models else None,
    }
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(out / name, dpi=_DPI)
            written.append(out / name)
    return written


def _where_time_goes(record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    results = record["results"]
    figure = Figure((_WIDTH, max(_LEAST_HEIGHT, 1.6 + _ROW * len(results))), layout="constrained")
    axes = figure.subplots()
    longest = max(result["seconds"]["first_token"]["median"] for result in results)
    for row, result in enumerate(results):
        left = 0.0
        for part, colour in zip(PARTS, _COLOURS, strict=False):
            seconds = result["seconds"].get(part, {"median": 0.0})["median"]
            axes.barh(row, seconds, left=left, color=colour, label=part if row == 0 else None, height=0.7)
            left += seconds
        whole = result["seconds"]["first_token"]["median"]
        axes.text(max(left, whole) + 0.01 * longest, row, f"{whole:.3g} s", va="center", fontsize=9)
    axes.set_yticks(range(len(results)), [_label(result, results) for result in results], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * longest)
    axes.set_xlabel("seconds to the first token, medians")
    _finish(figure, axes, "Where the time to the first token goes", record)
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=9)
    return figure


def _latency(record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    encoders = record["kind"] == "encoders"
    curves: dict[str, list[tuple[int, float, float, float]]] = {}
    for result in record["results"]:
        if not encoders and (result["resolution"] is None or "encode" not in result["seconds"]):
            continue
        seconds = result["seconds"] if encoders else result["seconds"]["encode"]
        name = f"{result['model']}, {result['dtype']}" + (f", batch {result['batch']}" if result["batch"] > 1 else "")
        point = (result["resolution"], *(1000 * seconds[key] / result["batch"] for key in ("median", "q1", "q3")))
        curves.setdefault(name, []).append(point)
    if not curves:
        return None
    figure = Figure((_WIDTH, 5.0), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        side, median, low, high = zip(*sorted(points), strict=True)
        errors = [
            [middle - end for middle, end in zip(median, low, strict=True)],
            [end - middle for middle, end in zip(median, high, strict=True)],
        ]
        colour = _COLOURS[index % len(_COLOURS)]
        axes.errorbar(side, median, errors, color=colour, marker="o", capsize=3, label=f"measured: {name}")
    axes.plot(
        [*PAPER_ENCODER_MS],
        [*PAPER_ENCODER_MS.values()],
        color="#666666",
        linestyle="--",
        marker="s",
        label=f"FastViTHD, {PAPER_SOURCE}",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sides = sorted({point[0] for points in curves.values() for point in points} | set(PAPER_ENCODER_MS))
    # Where two are too close for their numbers, the first has it.
    shown: list[int] = []
    for pixels in sides:
        if not shown or pixels >= 1.1 * shown[-1]:
            shown.append(pixels)
    axes.set_xticks(sides, [str(pixels) if pixels in shown else "" for pixels in sides], fontsize=9)
    axes.minorticks_off()
    axes.set_xlabel("height and width in pixels")
    axes.set_ylabel("encoder, milliseconds a picture")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    _finish(figure, axes, "Encoder's time by resolution (medians and quartiles)", record)
    return figure


def _accuracy(record: dict[str, Any]) -> Any:
    """Return the plot, or None where no published size was measured at the model card's resolution."""
    from matplotlib.figure import Figure

    results = [
        result
        for result in record["results"]
        if result["source"] in SIZES and result["resolution"] == MODEL_CARD_SIDE and result["kind"] != "other"
    ]
    if not results:
        return None
    figure = Figure((_WIDTH, 5.0), layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        kind = "native fast_vlm" if result["kind"] == "native" else "ours, fused" if result["fused"] else "ours"
        name = f"{kind}, {result['dtype']}" + (f", batch {result['batch']}" if result["batch"] > 1 else "")
        series.setdefault(name, []).append(result)
    for index, (name, points) in enumerate(series.items()):
        times = [point["seconds"]["first_token"]["median"] for point in points]
        means = [mean_accuracy(point["source"]) for point in points]
        order = sorted(range(len(points)), key=times.__getitem__)
        axes.plot(
            [times[at] for at in order],
            [means[at] for at in order],
            color=_COLOURS[index % len(_COLOURS)],
            marker="o",
            label=name,
        )
        for at in order:
            axes.annotate(
                points[at]["source"],
                (times[at], means[at]),
                textcoords="offset points",
                xytext=(6, -12 - 11 * (index % 2)),
                fontsize=9,
                color=_COLOURS[index % len(_COLOURS)],
            )
    axes.margins(0.18, 0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"seconds to the first token at {MODEL_CARD_SIDE} px, measured, medians")
    axes.set_ylabel("mean of 11 tasks, percent,\nfrom Apple's model card (not measured here)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    _finish(figure, axes, "Published accuracy against measured time", record)
    return figure


def _label(result: dict[str, Any], results: list[dict[str, Any]]) -> str:
    label = result["model"] + ("" if result["resolution"] is None else f"\n{result['resolution']} px")
    if len({other["dtype"] for other in results}) > 1:
        label += f", {result['dtype']}"
    if len({other["batch"] for other in results}) > 1:
        label += f", batch {result['batch']}"
    return label


def _finish(figure: Any, axes: Any, title: str, record: dict[str, Any]) -> None:
    machine, options = record["machine"], record["options"]
    threads = f"{options['threads']} thread" + ("" if options["threads"] == 1 else "s")
    place = machine.get("gpu") or f"{machine['cpu']}, {threads}"
    dtypes = ", ".join(options["dtypes"])
    axes.set_title(f"{title}\n{place}, {dtypes}", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
