# SPDX-License-Identifier: Apache-2.0
"""Effects on a tiny model's answers: padding, resolution, dtypes, the encoder's form, tiles, more images.

    python benchmarks/studies.py [MODEL] [--scenes 500] [--studies form tiles ...] [--out FILE] [--plot FILE]

Each study asks about the same scenes in several ways, by greedy decoding, and counts exact answers, as
tiny_accuracy.py does. The others are compared with the first way of a study: by the difference in points, question by
question, with its 95 % bootstrap interval, and by the number of changed answers, right or wrong. Studies that --out
already has are kept unless they are repeated. The default of MODEL is the test model of the package.

The train-time form is made from the merged weights: branches are drawn at random, and the main branch of each
convolution is the remainder. This shows the cost of merging, but nothing about training with branches.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _results
import torch
from _results import HELD_OUT_SERIES
from PIL import Image
from tiny_accuracy import REFERENCE, answers, load
from torch import nn
from transformers import AutoProcessor

from transformers_fastvlm import FastViTHDModel
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.evaluation.bootstrap import interval, resampled_means
from transformers_fastvlm.modeling_fastvithd import LargeKernelConv, MobileOneBlock, RepCPE, RepMixer

# Neither training nor any evaluation takes scenes from it.
OTHER_IMAGES_SERIES = 2027
SIDES = (128, 192, 320, 512)
PRECISIONS = (REFERENCE, "bfloat16", "float16", "int8", "int4")
OTHERS = (1, 3)
# Distinguishable for colour-blind readers (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00")


@dataclass(frozen=True)
class Cell:
    """One way of asking: which model, which scenes, and the image processor's options."""

    name: str
    model: str = REFERENCE
    aspect: str = "any"
    options: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, int] | None = None  # further images: of which kind and on which side, and how many


def studies(side: int) -> dict[str, list[Cell]]:
    """Return the cells of each study for a model that was made for this side in pixels."""
    grid = [[2 * side, side], [side, 2 * side], [2 * side, 2 * side]]
    return {
        "pad_or_crop": [
            Cell("padded", aspect="oblong"),
            Cell("cropped", aspect="oblong", options={"image_aspect_ratio": "square"}),
        ],
        "resolution": [
            Cell(f"{side} px"),
            *(Cell(f"{other} px", options={"size": other}) for other in SIDES if other != side),
        ],
        "precision": [Cell(name, name) for name in PRECISIONS],
        "form": [Cell("merged"), Cell("train-time", "train-time"), Cell("merged again", "merged-again")],
        "tiles": [
            Cell("one tile"),
            Cell("AnyRes", "anyres", options={"image_aspect_ratio": "anyres", "image_grid_pinpoints": grid}),
        ],
        "images": [
            Cell("1 image"),
            *(
                Cell(f"{1 + number} images, {words}", others=(kind, number))
                for kind, words in (
                    ("black-before", "black ones before it"),
                    ("scenes-before", "other scenes before it"),
                    ("scenes-after", "other scenes after it"),
                )
                for number in OTHERS
            ),
        ],
    }


class WithOthers:
    """Scenes whose questions come after further images too; the question is about the scene's own."""

    def __init__(self, scenes: SceneDataset, kind: str, number: int) -> None:
        self.scenes, self.kind, self.number = scenes, kind, number
        self.pool = SceneDataset(len(scenes) * number, seed=OTHER_IMAGES_SERIES)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.scenes[index]
        (own,) = row["images"]
        if self.kind == "black-before":
            others = [Image.new("RGB", own.size)] * self.number
        else:
            start = index * self.number
            others = [self.pool.scene(at).image for at in range(start, start + self.number)]
        row["images"] = [own, *others] if self.kind == "scenes-after" else [*others, own]
        row["messages"][0]["content"] = "<image>\n" * self.number + row["messages"][0]["content"]
        return row


@torch.no_grad()
def train_time_form(merged: FastViTHDModel, seed: int = 0) -> FastViTHDModel:
    """Return an encoder in train-time form that computes what a merged one does, to rounding.

    Every branch but the main one is drawn at random, as are the statistics of every BatchNorm that merging removes; the
    main branch then has what is missing to the merged kernel and bias.
    """
    config = copy.deepcopy(merged.config)
    config.reparameterized, config.freeze_batch_norm = False, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = FastViTHDModel(config).eval()
        missing = set(made.load_state_dict(merged.state_dict(), strict=False).missing_keys)
        for name, module in made.named_modules():
            if isinstance(module, nn.BatchNorm2d) and f"{name}.weight" in missing:
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.running_var, 0.5, 1.5),
                    (module.bias, -0.2, 0.2),
                    (module.running_mean, -0.2, 0.2),
                ):
                    tensor.uniform_(low, high)
            elif isinstance(module, RepMixer):
                module.layer_scale.uniform_(0.5, 1.5)
    wanted = dict(merged.named_modules())
    for name, module in made.named_modules():
        if isinstance(module, RepMixer):
            conv = wanted[name].reparam_conv
            identity = torch.zeros_like(conv.weight, dtype=torch.float64)
            identity[..., 1, 1] = 1
            scale = module.layer_scale.double().flatten()
            norm_scale, norm_shift = module.norm.rbr_skip.as_scale_and_shift()
            kernel = (conv.weight.double() - identity) / scale[:, None, None, None]
            kernel += identity * norm_scale[:, None, None, None]
            _complete(module.mixer, module.mixer.convolution, kernel, conv.bias.double() / scale + norm_shift)
        elif isinstance(module, MobileOneBlock) and name in wanted:
            conv = wanted[name].reparam_conv
            _complete(module, module.convolution, conv.weight.double(), conv.bias.double())
        elif isinstance(module, LargeKernelConv):
            conv = wanted[name].lkb_reparam
            small_kernel, small_bias = module.small_conv.merged()
            kernel = conv.weight.double() - nn.functional.pad(small_kernel, [2] * 4)
            _set(module.lkb_origin, kernel, conv.bias.double() - small_bias)
        elif isinstance(module, RepCPE):
            conv = wanted[name].reparam_conv
            module.pe.weight.copy_(conv.weight)
            module.pe.weight[:, 0, 3, 3] -= 1
            module.pe.bias.copy_(conv.bias)
    return made


def _complete(block: Any, main: Any, kernel: torch.Tensor, bias: torch.Tensor) -> None:
    """Give a block's main branch what its other branches lack to `kernel` and `bias`."""
    _set(main, torch.zeros_like(kernel), torch.zeros_like(bias))
    others_kernel, others_bias = block.merged_kernel()
    _set(main, kernel - others_kernel, bias - others_bias)


def _set(branch: Any, kernel: torch.Tensor, bias: torch.Tensor) -> None:
    """Let a convolution with its BatchNorm compute `kernel` and `bias`."""
    scale = branch.bn.weight.double() / torch.sqrt(branch.bn.running_var.double() + branch.bn.eps)
    branch.conv.weight.copy_(kernel / scale[:, None, None, None])
    branch.bn.bias.copy_(bias + branch.bn.running_mean.double() * scale)


def make_model(directory: Path, name: str, grid: list[list[int]]) -> Any:
    """Load the model that a cell names."""
    if name in PRECISIONS:
        return load(directory, name, "cpu")
    model = load(directory, REFERENCE, "cpu")
    if name == "anyres":
        model.config.image_aspect_ratio, model.config.image_grid_pinpoints = "anyres", grid
        return model
    model.model.vision_tower = train_time_form(model.model.vision_tower)
    if name == "merged-again":
        model.model.vision_tower.reparameterize()
    return model


def compare(rows: list[dict[str, Any]], given: list[str], first: list[str] | None, name: str) -> dict[str, Any]:
    """Return the percentage of exact answers and, beside those of the first cell, the difference; with intervals."""
    expected = [row["messages"][-1]["content"] for row in rows]
    right = [100.0 * (answer == truth) for answer, truth in zip(given, expected, strict=True)]
    found: dict[str, Any] = {
        "percent": round(sum(right) / len(right), 2),
        "interval": [round(bound, 2) for bound in interval(resampled_means(right, name))],
    }
    if first is not None:
        before = [100.0 * (answer == truth) for answer, truth in zip(first, expected, strict=True)]
        differences = [own - other for own, other in zip(right, before, strict=True)]
        found |= {
            "points": round(sum(differences) / len(differences), 2),
            "points_interval": [round(bound, 2) for bound in interval(resampled_means(differences, name))],
            "other_answers": sum(a != b for a, b in zip(given, first, strict=True)),
        }
    return found


def run(
    directory: Path,
    names: list[str],
    number: int,
    batch_size: int,
    say: Callable[[str], None] = print,
) -> dict[str, list[dict[str, Any]]]:
    """Return the results of the studies of these names."""
    processor = AutoProcessor.from_pretrained(directory)
    side = processor.image_processor.size["height"]
    chosen = {name: cells for name, cells in studies(side).items() if name in names}
    asked: dict[str, tuple[list[dict[str, Any]], list[str], float]] = {}
    models: dict[str, Any] = {}
    results: dict[str, list[dict[str, Any]]] = {}
    for study, cells in chosen.items():
        for at, cell in enumerate(cells):
            # Several studies begin with the same cell under another name.
            key = repr((cell.model, cell.aspect, cell.options, cell.others))
            if key not in asked:
                if cell.model not in models:
                    models = {kept: models[kept] for kept in models if kept == REFERENCE}
                    grid = cell.options.get("image_grid_pinpoints", [])
                    models[cell.model] = make_model(directory, cell.model, grid)
                scenes: Any = SceneDataset(number, seed=HELD_OUT_SERIES, task="questions", aspect=cell.aspect)
                if cell.others is not None:
                    scenes = WithOthers(scenes, *cell.others)
                begin = time.perf_counter()
                rows, given, _ = answers(
                    {cell.model: models[cell.model]}, processor, scenes, batch_size, **cell.options
                )
                asked[key] = rows, given[cell.model], time.perf_counter() - begin
            rows, given_here, seconds = asked[key]
            if at == 0:
                first = given_here
            result = {"cell": cell.name, **compare(rows, given_here, first if at else None, f"{study}/{cell.name}")}
            results.setdefault(study, []).append(result)
            difference = f" {result['points']:+.1f} points" if at else ""
            say(f"{study:12} {cell.name:36} {result['percent']:5.1f} %{difference} ({seconds:.0f} s)")
    return results


def table(cells: list[dict[str, Any]]) -> str:
    """Return a study's cells as a table in Markdown."""
    columns = ("", "exact answers", "95 % interval", "difference", "95 % interval", "other answers")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for cell in cells:
        row = [cell["cell"], f"{cell['percent']:.1f}", "{:.1f} to {:.1f}".format(*cell["interval"])]
        if "points" in cell:
            row += [f"{cell['points']:+.1f}", "{:+.1f} to {:+.1f}".format(*cell["points_interval"])]
            row.append(str(cell["other_answers"]))
        lines.append("| " + " | ".join(row + [""] * (6 - len(row))) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Draw every study's percentages with their intervals."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit('--plot needs matplotlib: pip install "transformers-fastvlm[bench]".') from error
    figure = Figure((8.0, 1.5 + 0.32 * sum(map(len, results.values()))), layout="constrained")
    axes = figure.subplots()
    labels, row = [], 0
    for colour, (study, cells) in zip(_COLOURS, results.items(), strict=False):
        for cell in cells:
            low, high = cell["interval"]
            error = [[cell["percent"] - low], [high - cell["percent"]]]
            axes.errorbar([cell["percent"]], [row], xerr=error, color=colour, marker="o", capsize=3)
            labels.append(f"{study.replace('_', ' ')}: {cell['cell']}")
            row += 1
    axes.set_yticks(range(row), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("percent exact answers, 95 % bootstrap intervals")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, dpi=150)


def kept(file: Path | None, scenes: int, asked: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the other studies that a file already has of the same scenes."""
    if file is None or not file.exists():
        return {}
    before = json.loads(file.read_text(encoding="utf-8"))
    if before["scenes"] != scenes:
        raise SystemExit(f"{file} is of {before['scenes']} scenes and not of {scenes}; name another --out.")
    return {name: cells for name, cells in before["studies"].items() if name not in asked}


def main() -> None:
    parser = _results.parser(__doc__, scenes=500, batch_size=50)
    parser.add_argument("model", type=Path, nargs="?", help="directory of the model; default: that of the package")
    parser.add_argument("--studies", nargs="+", choices=studies(256), default=[*studies(256)])
    parser.add_argument("--plot", type=Path, help="file for a plot, PNG")
    options = parser.parse_args()
    results = run(options.model or tiny_checkpoint(), options.studies, options.scenes, options.batch_size)
    before = kept(options.out, options.scenes, options.studies)
    results = {name: (results | before)[name] for name in studies(256) if name in results | before}
    if options.plot:
        plot(results, options.plot)
    values = {"scenes": options.scenes, "series": HELD_OUT_SERIES, "studies": results}
    _results.write(options, values, packages=["torchao"])


if __name__ == "__main__":
    main()
