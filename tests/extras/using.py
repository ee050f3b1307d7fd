# SPDX-License-Identifier: Apache-2.0
"""What the programs of this folder share: an image that the tiny model can read, and the command line in-process."""

import contextlib
import io
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

IMAGE = Path(__file__).resolve().parents[2] / "examples" / "images" / "sign.png"
QUESTION, ANSWER = "What number is written?", "628"


def fastvlm(*words: str) -> str:
    """Run the command `fastvlm` in this process and return what it printed on standard output."""
    from transformers_fastvlm.cli import main

    print("$ fastvlm", *words, file=sys.stderr, flush=True)
    status: object = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            status = main(list(words))
        except SystemExit as stop:
            status = stop.code
    assert not status, f"fastvlm {' '.join(words)} exited with {status}: {printed.getvalue()}"
    return printed.getvalue()


@contextlib.contextmanager
def server(*words: str) -> Iterator[str]:
    """Start a server with the command `fastvlm`, yield the URL that it names, and end it as Ctrl-C does not."""
    command = [sys.executable, "-m", "transformers_fastvlm", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if "http://" in line:
                    break
            assert said and "http://" in said[-1], said
            yield next(word for word in said[-1].split() if word.startswith("http://")).rstrip(".;,")
            process.terminate()
            assert process.wait(120) == 0
        finally:
            process.kill()


def fetch(address: str, body: bytes | None = None) -> bytes:
    """Return what a server answers."""
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()
