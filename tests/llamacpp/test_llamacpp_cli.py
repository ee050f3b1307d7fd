# SPDX-License-Identifier: Apache-2.0
"""The command's verbs with `--engine llamacpp`."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("llama_cpp", reason="the engine llamacpp is an extra")
pytest.importorskip("gguf", reason="the export to GGUF is an extra")

from llamacpp_cases import exported, pytorch, scenes

from transformers_fastvlm.cli import app
from transformers_fastvlm.engines import Sampling


@pytest.fixture
def fastvlm() -> Callable[..., Any]:
    """Run `fastvlm` with a model of the export; the result has `exit_code`, `stdout` and `stderr`."""

    def call(verb: str, *words: str | Path, stdin: str = "", code: int = 0) -> Any:
        given = [verb, *map(str, words), "-m", str(exported()), "--engine", "llamacpp"]
        result = CliRunner().invoke(app, given, input=stdin, prog_name="fastvlm")
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
        return result

    return call


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The image of the first scene."""
    scenes(1)[0][0]["content"][0]["image"].save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def question() -> tuple[str, str]:
    """Return the first scene's question, and the answer of PyTorch."""
    (asked,) = scenes(1)
    text = " ".join(part["text"].strip() for part in asked[0]["content"] if part["type"] == "text")
    content = [asked[0]["content"][0], {"type": "text", "text": text}]
    answer = pytorch().stream([{"role": "user", "content": content}], Sampling(max_new_tokens=16)).result()
    return text, answer.text


def test_generate(fastvlm: Callable[..., Any], image: Path) -> None:
    text, answer = question()
    words = (image, "-p", text, "--max-new-tokens", "16")
    found = json.loads(fastvlm("generate", *words, "--precision", "float32", "--json").stdout)
    assert (found["answer"], found["device"], found["dtype"]) == (answer, "cpu", "float32")
    assert fastvlm("generate", *words, "--device", "cpu").stdout.strip() == answer
    assert fastvlm("generate", *words, "--choices", "yes,no").stdout.strip() in ("yes", "no")


def test_chat(fastvlm: Callable[..., Any], image: Path) -> None:
    text, answer = question()
    said = fastvlm("chat", image, "--max-new-tokens", "16", stdin=f"{text}\nAnd now?\n/exit\n").stdout
    assert answer in said


def test_batch_goes_on_where_it_was_stopped(fastvlm: Callable[..., Any], image: Path, tmp_path: Path) -> None:
    text, answer = question()
    words = (image, "-p", text, "--max-new-tokens", "16", "-o", tmp_path / "out.jsonl", "--batch-size", "4")
    fastvlm("batch", *words)
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answer in row.values()


def test_serve(image: Path) -> None:
    text, answer = question()
    words = ["serve", "--port", "0", "-m", exported(), "--engine", "llamacpp", "--name", "tiny"]
    command = [sys.executable, "-m", "transformers_fastvlm", *map(str, words)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            url = next(found[1] for line in lines if (found := re.search(r"answers at (http://\S+)/v1;", line)))
            shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_of(image)}"}}
            content = [shown, {"type": "text", "text": text}]
            body = {"model": "tiny", "max_tokens": 16, "messages": [{"role": "user", "content": content}]}
            fields = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), fields)
            with urllib.request.urlopen(request, timeout=300) as response:
                found = json.load(response)
            assert found["choices"][0]["message"]["content"] == answer
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def base64_of(path: Path) -> str:
    import base64

    return base64.b64encode(path.read_bytes()).decode()


REFUSED = {
    "dtype": (("--dtype", "float32"), "--dtype and --size are fixed in a GGUF export; choose its --precision."),
    "size": (("--size", "512"), "--dtype and --size are fixed in a GGUF export"),
    "precision": (("--precision", "int3"), "has no language_model-int3.gguf; it has the precisions"),
    "beams": (("--num-beams", "2"), "the engine llamacpp has no beam search"),
    "device": (("--device", "abacus"), "device is 'abacus'; expected one of auto, cpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_are_refused(fastvlm: Callable[..., Any], case: str) -> None:
    words, message = REFUSED[case]
    result = fastvlm("generate", "-p", "?", *words, code=2)
    assert message in result.stderr and result.stderr.startswith("fastvlm: ") and len(result.stderr.splitlines()) <= 3
