# SPDX-License-Identifier: Apache-2.0
"""The runtimes side by side, a row for each engine and precision: accuracy, speed, memory and size.

    python benchmarks/runtimes.py [--model 0.5b] [--runtimes transformers:bfloat16 onnx:q8 ...] [--scenes 500]
        [--captions 40] [--rounds 3] [--new-tokens 32] [--threads N] [--work DIRECTORY]
        [--out benchmarks/results/runtimes.json]
    python benchmarks/runtimes.py --page

Accuracy is that of the tiny model: right answers about `--scenes` scenes that no training uses, and how many of
`--captions` captions are those of Transformers in float32, all by greedy decoding. Speed is that of `--model`: `0.5b`
has the shape of FastVLM-0.5B with random weights, asked about a new image of 1024 x 1024 pixels each time; `tiny` is
the quick variant. Every runtime has a separate process that stays alive, and they run alternately, so that
background load affects all of them; all must fit into memory together. `native` is Transformers' own
`fast_vlm` with timm's encoder, as a peer.

`--scenes 0` leaves out accuracy and `--rounds 0` speed; what is left out is kept as the file --out already has it.
What a runtime reads is exported into `--work`, by default a temporary directory; a directory of yours is used again.
The 0.5B shape needs 6 GB there. Runtimes whose packages are missing are left out, with a line that says so. `--page`
inserts the table of the record into docs/runtimes.md and measures nothing.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _results
import torch
from _results import DESCRIBE, HELD_OUT_SERIES, ask, percent, questions
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_fastvlm import FastVLMConfig
from transformers_fastvlm.bench import EngineCase, Options, photo_jpeg
from transformers_fastvlm.bench.cases import Case
from transformers_fastvlm.bench.engines_run import engine_request
from transformers_fastvlm.bench.measuring import spread
from transformers_fastvlm.bench.random_weights import random_model
from transformers_fastvlm.bench.worker_process import WorkerProcess, run_in_turns
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes.tokenizer import write_tokenizer
from transformers_fastvlm.engines import Sampling, load_engine
from transformers_fastvlm.tokens import image_token_id_of

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "runtimes.json"
PAGE = ROOT / "docs" / "runtimes.md"
BEGIN, END = "<!-- table of benchmarks/runtimes.py -->\n", "<!-- end of the table -->\n"
NOT_MEASURED = "The table has not been measured yet; `python benchmarks/runtimes.py` measures it.\n"

NATIVE = "native"
REFERENCE = ("transformers", "float32")
PIXELS = 1024
MAX_NEW_TOKENS = 96
PACKAGES = ("onnxruntime", "llama-cpp-python", "timm")


@dataclass(frozen=True)
class Runtime:
    """Rows of the table.

    Attributes:
        engine: name of the engine, or `NATIVE`.
        precisions: a row each.
        target: of `fastvlm export`; None if the engine loads checkpoints.
        only_tiny: precisions that are not measured with larger models.
    """

    engine: str
    precisions: tuple[str, ...]
    target: str | None = None
    only_tiny: tuple[str, ...] = ()


RUNTIMES = (
    Runtime("transformers", ("float32", "bfloat16")),
    Runtime(NATIVE, ("float32", "bfloat16"), "native"),
    Runtime("onnx", ("float32", "q8", "q4"), "onnx", only_tiny=("float32",)),
    Runtime("llamacpp", ("float16", "q8_0", "q4_0"), "gguf"),
)


@dataclass(frozen=True)
class Subject:
    """A row with the files that it reads."""

    runtime: Runtime
    precision: str
    directory: Path

    @property
    def case(self) -> EngineCase:
        """The engine to load; not for `NATIVE`."""
        return EngineCase(self.runtime.engine, str(self.directory), self.precision)

    @property
    def row(self) -> dict[str, Any]:
        """What every result of this row has."""
        size = sum(file.stat().st_size for file in self.directory.rglob("*") if file.is_file())
        return {"runtime": self.runtime.engine, "precision": self.precision, "bytes_on_disk": size}


def names(model: str = "tiny") -> list[str]:
    """Return the rows of a model as --runtimes takes them."""
    return [
        f"{runtime.engine}:{precision}"
        for runtime in RUNTIMES
        for precision in runtime.precisions
        if model == "tiny" or precision not in runtime.only_tiny
    ]


def subjects(model: str, wanted: list[str], work: Path) -> list[Subject]:
    """Return the requested rows of a model; those that cannot be exported here are left out."""
    found = []
    checkpoint = tiny_checkpoint() if model == "tiny" else random_checkpoint(model, work / model)
    for runtime in RUNTIMES:
        for precision in runtime.precisions:
            name = f"{runtime.engine}:{precision}"
            if name not in wanted or name not in names(model):
                continue
            # The large peer is built in memory with random weights.
            if runtime.target is None or (runtime.engine == NATIVE and model != "tiny"):
                found.append(Subject(runtime, precision, checkpoint))
            elif (directory := exported(model, checkpoint, runtime, precision, work)) is None:
                print(f"{name} is left out: its files cannot be exported here", file=sys.stderr, flush=True)
            else:
                found.append(Subject(runtime, precision, directory))
    return found


def random_checkpoint(model: str, directory: Path) -> Path:
    """Write a published shape with random weights in bfloat16 and a small tokenizer, unless it is there."""
    if not (directory / "config.json").exists():
        write_tokenizer(directory)
        config: Any = FastVLMConfig.from_preset(model)
        config.image_token_id = image_token_id_of(directory)
        random_model(config, torch.bfloat16, torch.device("cpu")).save_pretrained(directory)
    return directory


def exported(model: str, checkpoint: Path, runtime: Runtime, precision: str, work: Path) -> Path | None:
    """Return the directory of an export, made in a separate process unless it exists; None if that failed."""
    own = [] if runtime.engine == NATIVE else ["--precision", precision]  # whose files serve every dtype
    directory = work / "-".join([model, str(runtime.target), *own[1:]])
    if not directory.exists():
        command = [sys.executable, "-m", "transformers_fastvlm", "export", str(runtime.target), str(checkpoint)]
        if subprocess.run([*command, str(directory), *own, "--quiet"], stdout=subprocess.DEVNULL).returncode:
            shutil.rmtree(directory, ignore_errors=True)
            return None
    return directory


class Peer:
    """Transformers' own `fast_vlm` with its own processor, as an engine for `accuracy`."""

    def __init__(self, directory: Path, dtype: str) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(directory)

    def answers(self, conversations: list[Any]) -> list[str]:
        """Return the greedy answers, one after the other."""
        texts = []
        for conversation in conversations:
            inputs = self.processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(self.model.dtype)
            tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            texts.append(self.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        return texts


def answers(subject: Subject, conversations: list[Any]) -> list[str]:
    """Return a row's answers."""
    if subject.runtime.engine == NATIVE:
        return Peer(subject.directory, subject.precision).answers(conversations)
    case = subject.case
    with contextlib.closing(load_engine(case.engine, case.model, **case.load_options())) as engine:
        return [one.text for one in engine.generate(conversations, Sampling(max_new_tokens=MAX_NEW_TOKENS))]


def accuracy(found: list[Subject], scenes: int, captions: int) -> dict[str, Any]:
    """Ask all rows about the same scenes, one row after the other."""
    asked = questions(scenes)
    described = [ask(row["image"], DESCRIBE) for row in questions(captions, start=scenes, task="captions")]
    conversations = [row["conversation"] for row in asked] + described
    given: dict[tuple[str, str], list[str]] = {}
    results = []
    for subject in found:
        name = (subject.runtime.engine, subject.precision)
        try:
            given[name] = answers(subject, conversations)
        except ImportError as error:
            print(f"{':'.join(name)} is left out: {error}", file=sys.stderr, flush=True)
            continue
        right = [text == row["answer"] for text, row in zip(given[name], asked, strict=False)]
        result = {**subject.row, "right_percent": percent(right)}
        if REFERENCE in given:
            pairs = list(zip(given[name], given[REFERENCE], strict=True))
            result["same_answers"] = sum(one == other for one, other in pairs[:scenes])
            result["same_captions"] = sum(one == other for one, other in pairs[scenes:])
        results.append(result)
        print(f"{':'.join(name):24} {result}", file=sys.stderr, flush=True)
    return {"scenes": scenes, "captions": captions, "series": HELD_OUT_SERIES, "results": results}


def first_request(subject: Subject, model: str, options: argparse.Namespace, image_file: str) -> dict[str, Any]:
    """Return the first request to the process of a row."""
    if subject.runtime.engine != NATIVE:
        return engine_request(subject.case, options.threads, options.new_tokens, image_file)
    source, side = (str(subject.directory), None) if model == "tiny" else (model.upper(), PIXELS)
    case = Case(NATIVE, "other" if model == "tiny" else "native", source, side, subject.precision, 1, 0)
    chosen = Options(threads=options.threads, new_tokens=options.new_tokens)
    return {"case": asdict(case), "options": chosen.as_dict(), "image": image_file}


def speed(found: list[Subject], model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Load all rows, and ask them in turns."""
    say = partial(print, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        image_file = Path(folder) / "photo.jpg"
        image_file.write_bytes(photo_jpeg(PIXELS, PIXELS))
        loaded: list[tuple[Subject, WorkerProcess]] = []
        for subject in found:
            name = f"{subject.runtime.engine}:{subject.precision}"
            say(f"loading {name}")
            worker = stack.enter_context(WorkerProcess(name, options.threads))
            try:
                worker.facts = worker.ask(first_request(subject, model, options, str(image_file)))
            except ImportError as error:
                say(f"{name} is left out: {error}")
            else:
                loaded.append((subject, worker))
        runs = run_in_turns([worker for _, worker in loaded], 1, options.rounds, say)
        results = [
            {**subject.row, **measured(own[1:]), "prompt_tokens": worker.facts["prompt_tokens"]}
            for (subject, worker), own in zip(loaded, runs, strict=True)
        ]
    about = {"model": model, "pixels": PIXELS, "threads": options.threads, "rounds": options.rounds}
    return about | {"new_tokens": options.new_tokens, "results": results}


def measured(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return times and memory of the runs that count."""
    decode = [run["seconds"]["decode"] for run in runs if "decode" in run["seconds"]]
    return {
        "first_token_seconds": spread([run["seconds"]["first_token"] for run in runs]),
        "tokens_per_second": spread([1 / seconds for seconds in decode]) if decode else None,
        "peak_bytes": runs[-1]["peak_bytes"],
    }


def table(record: dict[str, Any]) -> str:
    """Return a record as a table in Markdown, and what was measured."""
    parts: dict[str, dict[tuple[str, str], dict[str, Any]]] = {
        part: {(one["runtime"], one["precision"]): one for one in record.get(part, {}).get("results", ())}
        for part in ("accuracy", "speed")
    }
    columns = ("runtime", "precision", "right answers", "same captions", "first token", "tokens/s", "memory", "files")
    rows = [columns]
    for runtime in RUNTIMES:
        for precision in runtime.precisions:
            name = (runtime.engine, precision)
            answered, timed = (parts[part].get(name, {}) for part in ("accuracy", "speed"))
            if answered or timed:
                rows.append((*name, *_accuracy_cells(answered), *_speed_cells(timed)))
    measured = [index for index in range(len(columns)) if any(row[index] for row in rows[1:])]
    lines = ["| " + " | ".join(row[index] for index in measured) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(measured))
    return "\n".join(lines) + "\n\n" + "\n".join(_explained(record)) + "\n"


def _accuracy_cells(found: dict[str, Any]) -> list[str]:
    if not found:
        return ["", ""]
    return [f"{found['right_percent']:.1f} %", str(found.get("same_captions", ""))]


def _speed_cells(found: dict[str, Any]) -> list[str]:
    if not found:
        return [""] * 4
    rate, memory = found["tokens_per_second"], found["peak_bytes"]
    return [
        f"{found['first_token_seconds']['median']:.2f} s",
        "" if rate is None else f"{rate['median']:.1f}",
        "" if memory is None else f"{memory / 2**30:.1f} GiB",
        f"{found['bytes_on_disk'] / 1e9:.2f} GB",
    ]


def _explained(record: dict[str, Any]) -> list[str]:
    lines = []
    if asked := record.get("accuracy"):
        lines.append(
            f"Right answers: the tiny model on {asked['scenes']} drawn scenes. Same captions: how many of "
            f"{asked['captions']} equal those of Transformers in float32."
        )
    if timed := record.get("speed"):
        model = timed["model"]
        shape = "the tiny model" if model == "tiny" else f"the {model.upper()} shape with random weights"
        lines.append(
            f"First token, tokens/s, memory and files: {shape}, an image of {timed['pixels']} px, "
            f"{record['machine']['cpu']}, {timed['threads']} threads; medians of {timed['rounds']} rounds, "
            "in which the runtimes take turns."
        )
        lines.append("Memory is the process's peak, including PyTorch.")
    return [*lines, "The record is `benchmarks/results/runtimes.json`."]


def page_with(page: str, record: dict[str, Any] | None) -> str:
    """Return the page with the record's table between the two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{NOT_MEASURED if record is None else table(record)}\n{END}{after}"


def main() -> None:
    """Measure and write the record, or insert its table into the page."""
    parser = _results.parser(__doc__, model="0.5b", scenes=500, captions=40, rounds=3, new_tokens=32, threads=None)
    parser.add_argument("--runtimes", nargs="+", choices=names(), default=names(), metavar="ENGINE:PRECISION")
    parser.add_argument("--work", type=Path, help="directory for exports, which are used again")
    parser.add_argument("--page", action="store_true", help="insert the table of the record into docs/runtimes.md")
    options = parser.parse_args()
    if options.page:
        record = json.loads((options.out or RECORD).read_text(encoding="utf-8"))
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
        return
    torch.set_num_threads(options.threads)
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out and options.out.exists() else {}
    parts = {part: before[part] for part in ("accuracy", "speed") if part in before}
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        if options.scenes:
            parts["accuracy"] = accuracy(subjects("tiny", options.runtimes, work), options.scenes, options.captions)
        if options.rounds:
            parts["speed"] = speed(subjects(options.model, options.runtimes, work), options.model, options)
    _results.write(options, parts, packages=PACKAGES)


if __name__ == "__main__":
    main()
