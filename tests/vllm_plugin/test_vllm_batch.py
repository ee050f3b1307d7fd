# SPDX-License-Identifier: Apache-2.0
"""`fastvlm batch --engine vllm` writes the rows that Transformers gives, also where it was killed on its way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

import psutil
from vllm_running import ENVIRONMENT, images_of, scene_questions

PROMPT = "Describe the picture."
PATIENCE = 1800  # far more than it takes; a slow machine must not fail a test
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def journal_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.journal")


def photos(tmp_path: Path) -> Path:
    """A folder of scenes, one file of which is no image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, scene in enumerate(scene_questions(20)[0]):
        images_of(scene)[0].save(folder / f"{index:02}.png")
    (folder / "07.png").write_text("no picture")
    return folder


def start(photos: Path, out: Path, engine: str, log: Path) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-m", "transformers_fastvlm", "batch", str(photos), "-o", str(out), "-p", PROMPT]
    words += ["-m", "tiny", "--engine", engine, "--dtype", "float32", "--batch-size", "4", "--max-new-tokens", "24"]
    with log.open("a") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path})


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.soak
def test_rows_of_a_killed_run_are_those_of_transformers(photos: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    plain, out = tmp_path / "transformers.jsonl", tmp_path / "vllm.jsonl"
    assert start(photos, plain, "transformers", log).wait(PATIENCE) == 1, log.read_text()  # 1: a row has an error

    first = start(photos, out, "vllm", log)
    deadline = time.monotonic() + PATIENCE
    while not (journal_of(out).exists() and journal_of(out).read_bytes().count(b"\n") >= 3):
        assert first.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    assert first.wait(PATIENCE) == -signal.SIGKILL
    assert not out.exists() and journal_of(out).exists()
    assert family
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == [], "vLLM's processes outlived the command"

    assert start(photos, out, "vllm", log).wait(PATIENCE) == 1, log.read_text()
    assert "of them from earlier runs" in log.read_text()
    assert rows(out) == rows(plain) and not journal_of(out).exists()
    found = rows(out)
    assert [row["error"] is None for row in found] == [index != 7 for index in range(20)]
    assert len({row["answer"] for row in found}) > 10
