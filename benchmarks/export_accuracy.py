# SPDX-License-Identifier: Apache-2.0
"""Exact answers of the tiny model's ONNX export in every precision, and through transformers.js' own preprocessing.

    python benchmarks/export_accuracy.py [--scenes 500] [--node FOLDER] [--node-scenes 200]
        [--out benchmarks/results/export_accuracy.json]

Exports the model, asks one question about each scene of a series that no training uses, by greedy decoding, and
counts exact answers: in PyTorch float32, and in onnxruntime in each precision, all with this package's preprocessing.
Each precision is also compared with PyTorch: by the difference in points, and by the number of changed answers, right
or wrong.

With FOLDER, in which `npm ci --ignore-scripts` was run (tests/export/javascript is one), the float32 files also
answer in transformers.js on Node, about square and about oblong images: from this package's pixel values, and from
the image, prepared by transformers.js itself. `grey_levels` is the mean distance between the two, of 255.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import _results
from _results import HELD_OUT_SERIES, differences, percent, questions

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.engines import Sampling, load_engine
from transformers_fastvlm.engines.onnx_engine import OnnxEngine
from transformers_fastvlm.export import TARGETS, Export, export

MAX_NEW_TOKENS = 32
REFERENCE = "pytorch float32"
SCRIPT = Path(__file__).parent.parent / "tests" / "export" / "javascript" / "run.mjs"


def share(given: list[str], rows: list[dict[str, Any]]) -> float:
    """Return the percentage of the answers that are the right ones."""
    return percent([text == row["answer"] for text, row in zip(given, rows, strict=True)])


def measure_precisions(done: Export, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ask PyTorch and each precision, one after the other."""
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    given: dict[str, list[str]] = {}
    for name in (REFERENCE, *done.precisions):
        if name == REFERENCE:
            engine = load_engine("transformers", str(tiny_checkpoint()), dtype="float32")
        else:
            engine = load_engine("onnx", str(done.directory), precision=name)
        given[name] = [answer.text for answer in engine.generate([row["conversation"] for row in rows], sampling)]
        engine.close()
        print(f"{name:16} {share(given[name], rows)} %", flush=True)
    correct = {name: share(texts, rows) for name, texts in given.items()}
    return {
        "exact_answers_percent": correct,
        "against_pytorch_float32": differences(given, correct, REFERENCE),
        "relative_error": done.report.errors,
    }


def measure_javascript(done: Export, folder: Path, count: int) -> dict[str, Any]:
    """Ask transformers.js about square and oblong images."""
    processor = OnnxEngine(done.directory, "float32").processor
    found = {}
    for aspect in ("square", "oblong"):
        rows = questions(count, aspect=aspect)
        with tempfile.TemporaryDirectory() as name:
            results = _answers_in_node(done.directory, folder, Path(name), rows, processor)
        found[aspect] = {
            "our_pixel_values": share([result["text"] for result in results], rows),
            "own_pixel_values": share([result["own"] for result in results], rows),
            "grey_levels": round(sum(result["distance"] for result in results) / count, 2),
        }
        print(f"{aspect:16} {found[aspect]}", flush=True)
    return {"scenes": count, **found}


def _answers_in_node(
    directory: Path, packages: Path, work: Path, rows: list[dict[str, Any]], processor: Any
) -> list[dict[str, Any]]:
    cases = []
    for number, row in enumerate(rows):
        inputs = processor.apply_chat_template(
            row["conversation"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
        )
        image, pixels = work / f"{number}.png", work / f"{number}.f32"
        row["image"].save(image)
        pixels.write_bytes(inputs["pixel_values"].astype("float32").tobytes())
        case = {"image": str(image), "pixels": str(pixels), "shape": inputs["pixel_values"].shape}
        cases.append(case | {"question": row["question"], "input_ids": inputs["input_ids"][0].tolist()})
    (work / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    # Node looks for packages beside the script.
    shutil.copyfile(SCRIPT, work / SCRIPT.name)
    (work / "node_modules").symlink_to((packages / "node_modules").resolve())
    command = ["node", SCRIPT.name, str(directory.resolve()), "fp32", "cases.json"]
    lines = subprocess.run(command, cwd=work, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def node_versions(folder: Path) -> dict[str, str]:
    """Return the versions of transformers.js and of Node."""
    package = folder / "node_modules" / "@huggingface" / "transformers" / "package.json"
    node = subprocess.run(["node", "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    return {"transformers.js": json.loads(package.read_text(encoding="utf-8"))["version"], "node": node}


def main() -> None:
    parser = _results.parser(__doc__, scenes=500, node_scenes=200)
    parser.add_argument("--node", type=Path, metavar="FOLDER", help="folder with node_modules")
    options = parser.parse_args()
    found: dict[str, Any] = {"scenes": options.scenes, "series": HELD_OUT_SERIES}
    with tempfile.TemporaryDirectory() as work:
        done = export("onnx", tiny_checkpoint(), Path(work) / "tiny", precision=TARGETS["onnx"].precisions)
        found |= measure_precisions(done, questions(options.scenes))
        if options.node is not None:
            found["transformers_js"] = measure_javascript(done, options.node, options.node_scenes)
            found["transformers_js"]["versions"] = node_versions(options.node)
    _results.write(options, found, packages=["onnx", "onnxruntime", "onnxscript"])


if __name__ == "__main__":
    main()
