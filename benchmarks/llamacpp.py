# SPDX-License-Identifier: Apache-2.0
"""The engine llamacpp beside llama.cpp's own decoding of the same files, and many requests at once beside one by one.

    python benchmarks/llamacpp.py --node FOLDER [--model 0.5b] [--precisions q8_0 q4_0] [--rounds 5] [--new-tokens 64]
        [--requests 8] [--threads N] [--work DIRECTORY] [--out benchmarks/results/llamacpp.json]

FOLDER is one in which `npm install --ignore-scripts node-llama-cpp` was run; without --node only the second part is
measured. Both sides decode greedily after a prompt of as many tokens, the engine's with an image, in turns: the engine
in this process and node-llama-cpp in another one that stays alive. Only tokens after the first count, so the encoder
plays no part.

Requests at once and one by one are texts without images, with answers of at most --new-tokens tokens; tokens per second
are of the whole time. Models and --work are those of benchmarks/runtimes.py.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import _results
import torch
from _results import DESCRIBE, ask, questions
from runtimes import Subject, subjects

from transformers_fastvlm.bench.measuring import ratio, spread
from transformers_fastvlm.engines import Engine, Sampling, load_engine

SCRIPT = Path(__file__).with_name("llamacpp_decode.mjs")
REST = 0.25
"""Seconds between two turns, until threads of the other side no longer spin."""


class NodeDecoder:
    """node-llama-cpp in a process that stays alive."""

    def __init__(self, file: Path, packages: Path, folder: Path, *numbers: int) -> None:
        # Node looks for packages beside the script.
        shutil.copyfile(SCRIPT, folder / SCRIPT.name)
        if not (folder / "node_modules").exists():
            (folder / "node_modules").symlink_to((packages / "node_modules").resolve())
        command = ["node", SCRIPT.name, str(file.resolve()), *map(str, numbers)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, text=True)

    def rate(self) -> float:
        """Return tokens a second of one answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline())["tokens_per_second"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def decoding_rate(engine: Engine, conversation: Any, new_tokens: int) -> float:
    """Return the engine's tokens a second after the first one."""
    request = engine.stream(conversation, Sampling(max_new_tokens=new_tokens))
    tokens = request.result().completion_tokens
    assert request.first_at is not None and request.ended_at is not None
    return (tokens - 1) / (request.ended_at - request.first_at)


def in_turns(sides: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Return the rates of each side, without the first turn."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1 + rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            time.sleep(REST)
            rates[name].append(sides[name]())
    return {name: found[1:] for name, found in rates.items()}


def beside_node(engine: Engine, subject: Subject, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return tokens a second of both sides, and the engine's part of llama.cpp's own."""
    conversation = ask(questions(1)[0]["image"], DESCRIBE)
    prompt_tokens = engine.prepare(conversation).tokens
    (file,) = subject.directory.glob("*.gguf")
    numbers = (options.threads, prompt_tokens, options.new_tokens)
    with contextlib.closing(NodeDecoder(file, options.node, folder, *numbers)) as node:
        rates = in_turns(
            {"engine": lambda: decoding_rate(engine, conversation, options.new_tokens), "node-llama-cpp": node.rate},
            options.rounds,
        )
    return {
        "prompt_tokens": prompt_tokens,
        "tokens_per_second": {name: spread(found) for name, found in rates.items()},
        "engine_to_llamacpp": ratio(median(rates["engine"]), median(rates["node-llama-cpp"])),
    }


def at_once(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """Return tokens a second of many requests at once and of one after another."""
    conversations = [
        [{"role": "user", "content": [{"type": "text", "text": f"Tell a story about {number} ships."}]}]
        for number in range(2, 2 + options.requests)
    ]
    sampling = Sampling(max_new_tokens=options.new_tokens)

    def rate(groups: list[list[Any]]) -> float:
        start = time.perf_counter()
        tokens = sum(answer.completion_tokens for group in groups for answer in engine.generate(group, sampling))
        return tokens / (time.perf_counter() - start)

    groups = {"at_once": [conversations], "one_by_one": [[one] for one in conversations]}
    rates = in_turns({name: lambda name=name: rate(groups[name]) for name in groups}, options.rounds)
    return {
        "requests": options.requests,
        "tokens_per_second": {name: spread(found) for name, found in rates.items()},
        "at_once_to_one_by_one": ratio(median(rates["at_once"]), median(rates["one_by_one"])),
    }


@contextlib.contextmanager
def loaded(subject: Subject, options: argparse.Namespace) -> Iterator[Engine]:
    """Load a row's engine, with a cache for all requests at once."""
    case = subject.case
    more: dict[str, Any] = {"device": "cpu", "threads": options.threads, "batch_size": options.requests}
    engine = load_engine(case.engine, case.model, **case.load_options() | more)
    with contextlib.closing(engine):
        yield engine


def main() -> None:
    """Measure, and write the record."""
    parser = _results.parser(
        __doc__, model="0.5b", precisions=["q8_0", "q4_0"], rounds=5, new_tokens=64, requests=8, threads=None
    )
    parser.add_argument("--node", type=Path, metavar="FOLDER", help="folder with node-llama-cpp in node_modules")
    parser.add_argument("--work", type=Path, help="directory for exports, which are used again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        work = options.work or Path(name)
        for subject in subjects(options.model, [f"llamacpp:{precision}" for precision in options.precisions], work):
            with loaded(subject, options) as engine:
                found = {} if options.node is None else beside_node(engine, subject, options, Path(name))
                results[subject.precision] = found | at_once(engine, options)
            print(subject.precision, results[subject.precision], flush=True)
    values = {**_results.settings(options, "node", "work"), "results": results}
    if options.node is not None:
        package = options.node / "node_modules" / "node-llama-cpp" / "package.json"
        values["node-llama-cpp"] = json.loads(package.read_text(encoding="utf-8"))["version"]
    _results.write(options, values, packages=["llama-cpp-python", "onnxruntime"])


if __name__ == "__main__":
    main()
