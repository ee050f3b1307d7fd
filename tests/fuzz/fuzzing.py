# SPDX-License-Identifier: Apache-2.0
"""Try mutated files and requests; report undocumented exceptions, hangs, large memory and files touched elsewhere.

    python tests/fuzz/fuzzing.py --inputs 10000 --out benchmarks/results/fuzzing.json
    python tests/fuzz/fuzzing.py --kind image --first 4711 --inputs 1          # one input again

The inputs are tried in another process. An audit hook sees what that process opens, removes, starts and calls.
"""

import argparse
import base64
import contextlib
import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "server")]
sys.path.append(str(Path(__file__).parents[2] / "src"))

import mutating  # noqa: E402

SECONDS = 5.0
"""CPU time after which an input counts as a hang."""
MEGABYTES = 2048
"""Memory above that of the process before, after which an input counts as too large."""
LONGEST = 60.0
"""Seconds of CPU time without a word, start included, after which a worker is ended: its input hangs."""
PATIENCE = 600.0
"""The same in seconds by the clock, for what waits and does not compute."""
MOST_BYTES = 2**25
"""Of a body that the server takes."""
SHARES = {"image": 0.55, "rows": 0.15, "table": 0.1, "video": 0.05, "request": 0.15}
"""Of all inputs, by kind."""

_LONGEST_MESSAGE = 1500
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_FOREIGN = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen"}


@dataclass
class Watch:
    """Sees what the process does to files, other programs and the network, while an input is tried.

    Args:
        folder: where files may be written.
        secret: a file beside it that nothing may open.
        ports: of this machine that may be connected to.
    """

    folder: str
    secret: str
    ports: set[int] = field(default_factory=set)
    on: bool = False
    found: list[str] = field(default_factory=list)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take one audit event."""
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return
            name = os.path.realpath(os.fsdecode(path))
            outside = not name.startswith(self.folder + os.sep) and name != os.devnull
            if name == self.secret or (outside and (flags or 0) & _WRITES):
                self.found.append(f"{event} {name}")
        elif event in _CHANGES:
            for path in arguments[:2]:
                if isinstance(path, str | bytes | os.PathLike):
                    name = os.path.abspath(os.fsdecode(path))
                    if not name.startswith(self.folder):
                        self.found.append(f"{event} {name}")
        elif event in _FOREIGN:
            self.found.append(f"{event} {arguments[0]!r}")
        elif event in ("socket.connect", "socket.getaddrinfo"):
            port = arguments[1][1] if event == "socket.connect" and isinstance(arguments[1], tuple) else arguments[1]
            if port not in self.ports:
                self.found.append(f"{event} {arguments[1:]!r}")


class Echo:
    """An engine without a model: what is tried here are the ways to it."""

    batch_size = None

    def check(self, sampling: Any) -> None:
        """Every option is fine."""

    def stream(self, conversation: Any, sampling: Any) -> Any:
        """Return a request that is answered."""
        from transformers_fastvlm.engines import Answer

        answer = Answer(text="x", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
        return SimpleNamespace(result=lambda: answer, when_done=lambda call: call())

    def close(self) -> None:
        """Nothing to give back."""


Way = Callable[[Path], str]
"""What is done with a file; returns "read" or "refused"."""
Job = tuple[str, int, int]
"""A kind, the number of its first input, and how many of them."""


def _batch(paths: Sequence[Path], folder: Path, **options: Any) -> str:
    from transformers_fastvlm.batch import BatchOptions, run_batch

    out = folder / "answers.jsonl"
    for old in folder.glob("answers.jsonl*"):
        old.unlink()
    chosen = BatchOptions(prompt="What is it?", **options)
    report = run_batch(list(map(str, paths)), out, Echo, chosen, about={})
    for line in out.read_text(encoding="utf-8").splitlines():
        error = json.loads(line)["error"]
        if error is not None:
            check_message(error)
    return "refused" if report.errors else "read"


def check_message(message: str) -> None:
    """Raise AssertionError unless a message can be shown to a person on a terminal."""
    assert len(message) <= _LONGEST_MESSAGE, f"a message of {len(message)} characters: {message[:200]!r}"
    assert message.count("\n") <= 2, f"a message of more than three lines: {message[:400]!r}"
    # Control characters reach a terminal through what prints a message, which escapes them; a repr never has any.
    assert "\x1b" not in message, f"an escape in a message: {message!r}"


def ways_of_images(folder: Path) -> list[Way]:
    from transformers_fastvlm import FastVLMImageProcessorPil, data

    processor: Any = FastVLMImageProcessorPil(size={"height": 64, "width": 64})

    def by_path(path: Path) -> str:
        processor(str(path))
        return "read"

    def by_text(path: Path) -> str:
        processor("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
        return "read"

    def by_row(path: Path) -> str:
        row = {"image": path.name, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
        data.load([row], path.parent)[0]
        return "read"

    def by_check(path: Path) -> str:
        row = {"image": path.name, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
        report = data.check_dataset([row], path.parent)
        for problem in report.problems:
            check_message(str(problem))
        return "refused" if report.problems else "read"

    return [by_path, by_text, by_row, by_check, lambda path: _batch([path], folder)]


def ways_of_rows(folder: Path) -> list[Way]:
    from transformers_fastvlm import data

    def load(path: Path) -> str:
        samples = data.load(str(path), path.parent)
        for index in range(min(len(samples), 50)):
            try:
                samples[index]
            except data.SampleError as error:
                check_message(str(error))
        return "read"

    def check(path: Path) -> str:
        report = data.check_dataset(str(path), path.parent)
        for problem in report.problems:
            check_message(str(problem))
        return "refused" if report.problems else "read"

    return [load, check]


def ways_of_requests(ports: set[int]) -> Iterator[list[Way]]:
    """Yield the ways once, while a server of the tiny model runs."""
    import http_running

    with http_running.running(*http_running.load_tiny()) as server:
        ports.add(server.port)

        def post(path: Path) -> str:
            body = path.read_bytes()
            headers = {"Content-Type": "application/json"}
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(f"{server.url}/v1/chat/completions", body, headers), timeout=PATIENCE
                ) as response:
                    answer = response.read()
            except urllib.error.HTTPError as error:
                with error:
                    status, answer = error.code, error.read()
            except urllib.error.URLError as error:
                # Of a body that is far too large the server reads a part after its 413, and then ends the connection.
                if isinstance(error.reason, ConnectionError) and len(body) > MOST_BYTES:
                    return "refused"
                raise
            else:
                assert b'"error"' not in answer, f"an answer that fails: {answer[-300:]!r}"
                return "read"
            assert 400 <= status < 500, f"status {status}: {answer[:300]!r}"
            check_message(json.loads(answer)["error"]["message"])
            return "refused"

        yield [post]
        assert server.get("/health")[0] == 200


@contextlib.contextmanager
def ways_of(kind: str, folder: Path, ports: set[int]) -> Iterator[list[Way]]:
    """Give what can be done with a file of a kind."""
    if kind == "image":
        yield ways_of_images(folder)
    elif kind == "rows":
        yield ways_of_rows(folder)
    elif kind == "table":
        yield [lambda path: _batch([path], folder, image_column="image")]
    elif kind == "video":
        yield [lambda path: _batch([path], folder, every=0.5)]
    else:
        yield from ways_of_requests(ports)


def memory() -> float:
    """Return the largest memory of this process since `forget_memory`, in MB."""
    text = Path("/proc/self/status").read_text() if sys.platform == "linux" else ""
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def work(jobs: Sequence[Job]) -> None:
    """Try inputs and print a line of JSON for each."""
    for handle in (sys.stdout, sys.stderr):
        handle.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    from transformers_fastvlm import data  # noqa: F401  what is imported later would count as opened files

    with tempfile.TemporaryDirectory() as temporary:
        base = Path(os.path.realpath(temporary))
        folder = base / "inputs"
        folder.mkdir()
        secret = base / "secret.png"
        mutating.drawn_image().save(secret)
        for name in ("a.png", "b.png"):
            mutating.drawn_image().save(folder / name)
        watch = Watch(str(folder), str(secret))
        sys.addaudithook(watch.hook)
        for kind, first, count in jobs:
            with ways_of(kind, folder, watch.ports) as ways:
                for way in ways:  # what is loaded at the first use is no finding
                    with contextlib.suppress(Exception):
                        way(folder / "a.png")
                for number in range(first, first + count):
                    name, content = getattr(mutating, kind)(number)
                    path = folder / f"{number}-{name}"
                    path.write_bytes(content)
                    tried = try_input(ways[number % len(ways)], path, watch)
                    print(json.dumps({"kind": kind, "number": number, "name": name, **tried}), flush=True)
                    for left in folder.iterdir():
                        if left.name not in ("a.png", "b.png") and left.is_file():
                            left.unlink()


def try_input(way: Way, path: Path, watch: Watch) -> dict[str, Any]:
    """Do with a file what can be done with it; return what came of it."""
    forget_memory()
    before, start = memory(), time.process_time()
    outcome, found = "refused", ""
    watch.found.clear()
    watch.on = True
    try:
        outcome = way(path)
    except Exception as error:
        if not documented(error):
            found = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            try:
                check_message(str(error))
            except AssertionError as problem:
                found = str(problem)
    finally:
        watch.on = False
    return {
        "outcome": outcome,
        "exception": found,
        "seconds": round(time.process_time() - start, 3),
        "megabytes": round(memory() - before, 1),
        "touched": watch.found[:3],
    }


def documented(error: Exception) -> bool:
    """Whether an exception is one that the docs promise for input that cannot be used."""
    from transformers_fastvlm.data import ImageError, LengthError, SampleError

    return type(error) in (ValueError, SampleError, ImageError, LengthError)


def run(jobs: Sequence[Job]) -> tuple[list[dict[str, Any]], list[str]]:
    """Try inputs in a worker process, and in another one after each that dies.

    Returns:
        A row for each input, and what the workers died of.
    """
    rows: list[dict[str, Any]] = []
    deaths: list[str] = []
    left = list(jobs)
    while left:
        command = [sys.executable, __file__, "--worker", json.dumps(left)]
        environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as worker,
        ):
            answers = list(_lines(worker))
            code = worker.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace")
        rows += answers
        left = _without(left, len(answers))
        if left:
            kind, number, _ = left[0]
            reason = "hangs" if code == -9 else f"ends the process with {code}: {said[-500:]}"
            deaths.append(f"{kind} {number} {reason}")
            left = _without(left, 1)
        elif code != 0:
            deaths.append(f"the worker ended with {code}: {said[-500:]}")
    return rows, deaths


def _without(jobs: Sequence[Job], done: int) -> list[Job]:
    """Return what is left of jobs after so many inputs."""
    left = []
    for kind, first, count in jobs:
        skipped = min(done, count)
        done -= skipped
        if skipped < count:
            left.append((kind, first + skipped, count - skipped))
    return left


def _lines(worker: "subprocess.Popen[bytes]") -> Iterator[dict[str, Any]]:
    """Yield what a worker prints; end it where it is silent for too long."""
    assert worker.stdout is not None
    waiting = selectors.DefaultSelector()
    waiting.register(worker.stdout, selectors.EVENT_READ)
    heard, used = time.monotonic(), 0.0
    while True:
        if waiting.select(5):
            line = worker.stdout.readline()
            if not line:
                return
            yield json.loads(line)
            heard, used = time.monotonic(), cpu_seconds(worker.pid)
        elif time.monotonic() - heard > PATIENCE or cpu_seconds(worker.pid) - used > LONGEST:
            worker.kill()
            return


def cpu_seconds(process: int) -> float:
    """Return the CPU time that another process has used; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def jobs_of(inputs: int, kinds: Sequence[str] = mutating.KINDS, first: int = 0) -> list[Job]:
    """Return so many inputs of some kinds, in their shares."""
    total = sum(SHARES[kind] for kind in kinds)
    return [(kind, first, max(1, round(inputs * SHARES[kind] / total))) for kind in kinds]


def report_of(jobs: Sequence[Job]) -> dict[str, Any]:
    """Try inputs and return what was found."""
    rows, deaths = run(jobs)
    report: dict[str, Any] = {"inputs": len(rows) + len(deaths), "kinds": {}}
    for kind, _, _ in jobs:
        of_kind = [row for row in rows if row["kind"] == kind]
        report["kinds"][kind] = {
            **Counter(row["outcome"] for row in of_kind),
            "largest_seconds": max((row["seconds"] for row in of_kind), default=0),
            "largest_megabytes": max((row["megabytes"] for row in of_kind), default=0),
        }
    named = [(f"{row['kind']} {row['number']} ({row['name']})", row) for row in rows]
    report["exceptions"] = [f"{what}: {row['exception']}" for what, row in named if row["exception"]]
    report["hangs"] = [f"{what}: {row['seconds']} s" for what, row in named if row["seconds"] > SECONDS]
    report["large"] = [f"{what}: {row['megabytes']} MB" for what, row in named if row["megabytes"] > MEGABYTES]
    report["touched"] = [f"{what}: {event}" for what, row in named for event in row["touched"]]
    for death in deaths:
        report["hangs" if death.endswith("hangs") else "exceptions"].append(death)
    return report


def main() -> int:
    """Run from the command line; exit with 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--kind", choices=mutating.KINDS)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--out", type=Path, help="file for the record, in JSON")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.worker)
        return 0
    start = time.monotonic()
    report = report_of(jobs_of(chosen.inputs, [chosen.kind] if chosen.kind else mutating.KINDS, chosen.first))
    report["minutes"] = round((time.monotonic() - start) / 60, 1)
    if chosen.out:
        from transformers_fastvlm.bench.measuring import surroundings

        packages = ("pillow", "av", "pyarrow", "datasets", "fastapi", "uvicorn")
        chosen.out.write_text(json.dumps(report | surroundings(packages=packages), indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 1 if any(report[name] for name in ("exceptions", "hangs", "large", "touched")) else 0


if __name__ == "__main__":
    sys.exit(main())
