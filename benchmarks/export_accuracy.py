# SPDX-License-Identifier: Apache-2.0
"""Exact answers of the tiny model's ONNX export in every precision, and through transformers.js' own preprocessing.

    python benchmarks/export_accuracy.py [--scenes 500] [--node FOLDER] [--node-scenes 200]
        [--out benchmarks/results/export_accuracy.json]

Exports the model, asks one question about each scene of a series that no training uses, greedily, and counts the
answers that equal the right one letter for letter: in PyTorch float32, and in onnxruntime in each precision, all with
this package's preprocessing. Each precision is also compared with PyTorch: by the difference in points, and by the
number of answers that are other ones, right or wrong.

With FOLDER, in which `npm ci --ignore-scripts` was run (tests/export/javascript is one), the float32 files also answer
in transformers.js on Node, about square and about oblong pictures: from this package's pixel values, and from the
picture, prepared by transformers.js itself. `grey_levels` is the mean distance between the two, of 255.
"""

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers_fastvlm.bench.machine import machine, versions

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.engines import Sampling, load_engine
from transformers_fastvlm.engines.onnx_engine import OnnxEngine
from transformers_fastvlm.export import TARGETS, Export, export

HELD_OUT_SERIES = 2026
MAX_NEW_TOKENS = 32
REFERENCE = "pytorch float32"
SCRIPT = Path(__file__).parent.parent / "tests" / "export" / "javascript" / "run.mjs"


def rows_of(count: int, aspect: str) -> list[dict[str, Any]]:
    """Return `count` scenes as {picture, question, answer, conversation}."""
    scenes = SceneDataset(count, seed=HELD_OUT_SERIES, aspect=aspect)
    rows = []
    for index in range(count):
        row = scenes[index]
        question, answer = (message["content"] for message in row["messages"][:2])
        question, picture = question.removeprefix("<image>\n"), row["images"][0]
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        rows.append(
            {
                "picture": picture,
                "question": question,
                "answer": answer,
                "conversation": [{"role": "user", "content": content}],
            }
        )
    return rows


def percent(given: list[str], rows: list[dict[str, Any]]) -> float:
    """Return how many of the answers are the right ones."""
    return round(100 * sum(text == row["answer"] for text, row in zip(given, rows, strict=True)) / len(rows), 2)


def measure_precisions(done: Export, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ask PyTorch and each precision, one after the other."""
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    given: dict[str, list[str]] = {}
    for name in (REFERENCE, *done.precisions):
        engine: Any
        if name == REFERENCE:
            engine = load_engine("transformers", str(tiny_checkpoint()), dtype="float32")
        else:
            engine = OnnxEngine(done.directory, name)
        given[name] = [answer.text for answer in engine.generate([row["conversation"] for row in rows], sampling)]
        engine.close()
        print(f"{name:16} {percent(given[name], rows)} %", flush=True)
    correct = {name: percent(texts, rows) for name, texts in given.items()}
    return {
        "exact_answers_percent": correct,
        "against_pytorch_float32": {
            name: {
                "points": round(correct[name] - correct[REFERENCE], 2),
                "other_answers": sum(a != b for a, b in zip(given[name], given[REFERENCE], strict=True)),
            }
            for name in done.precisions
        },
        "relative_error": done.report.errors,
    }


def measure_javascript(done: Export, folder: Path, count: int) -> dict[str, Any]:
    """Ask transformers.js about square and oblong pictures."""
    processor = OnnxEngine(done.directory, "float32").processor
    found = {}
    for aspect in ("square", "oblong"):
        rows = rows_of(count, aspect)
        with tempfile.TemporaryDirectory() as name:
            results = _answers_in_node(done.directory, folder, Path(name), rows, processor)
        found[aspect] = {
            "our_pixel_values": percent([result["text"] for result in results], rows),
            "own_pixel_values": percent([result["own"] for result in results], rows),
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
        picture, pixels = work / f"{number}.png", work / f"{number}.f32"
        row["picture"].save(picture)
        pixels.write_bytes(inputs["pixel_values"].astype("float32").tobytes())
        case = {"picture": str(picture), "pixels": str(pixels), "shape": inputs["pixel_values"].shape}
        cases.append(case | {"question": row["question"], "input_ids": inputs["input_ids"][0].tolist()})
    (work / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    # Node looks for packages beside the script.
    shutil.copyfile(SCRIPT, work / SCRIPT.name)
    (work / "node_modules").symlink_to((packages / "node_modules").resolve())
    command = ["node", SCRIPT.name, str(directory.resolve()), "fp32", "cases.json"]
    lines = subprocess.run(command, cwd=work, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def _versions(folder: Path | None) -> dict[str, str]:
    found = versions() | {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
    if folder is not None:
        package = folder / "node_modules" / "@huggingface" / "transformers" / "package.json"
        found["transformers.js"] = json.loads(package.read_text(encoding="utf-8"))["version"]
        found["node"] = subprocess.run(
            ["node", "--version"], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--node", type=Path, metavar="FOLDER", help="folder with node_modules")
    parser.add_argument("--node-scenes", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"scenes": options.scenes, "series": HELD_OUT_SERIES}
    with tempfile.TemporaryDirectory() as work:
        done = export("onnx", tiny_checkpoint(), Path(work) / "tiny", precision=TARGETS["onnx"].precisions)
        found |= measure_precisions(done, rows_of(options.scenes, "any"))
        if options.node is not None:
            found["transformers_js"] = measure_javascript(done, options.node, options.node_scenes)
    found |= {"machine": machine(torch.device("cpu")), "versions": _versions(options.node)}
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
