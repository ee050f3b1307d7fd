# SPDX-License-Identifier: Apache-2.0
"""`fastvlm batch`: its answers beside those of `fastvlm generate`, what it says, exit codes, kills of the command."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.engines import TransformersEngine

PROMPT = "Describe the image."


@pytest.fixture
def model(checkpoint) -> Path:
    return checkpoint("qwen2_untied")


@pytest.fixture
def photos(tmp_path, golden) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("wide_rgb.png", "square_rgb.png", "gray_l.png"):
        (folder / name).write_bytes((golden / "images" / name).read_bytes())
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_as_generate(run, model, photos, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    options = ("-p", PROMPT, "-m", model, "--max-new-tokens", 6, "--dtype", "float32", "--device", "cpu")
    result = run("batch", photos, "-o", out, *options, "--batch-size", 2)
    assert result.stdout == ""
    rows = rows_of(out)
    cut = sum(row["finish_reason"] == "length" for row in rows)
    assert result.stderr == f"3 rows in {out}" + (f" ({cut} cut at --max-new-tokens)\n" if cut else "\n")
    assert [row["source"] for row in rows] == [str(file) for file in sorted(photos.iterdir())]
    for row in rows:
        assert row["answer"] == json.loads(run("generate", row["source"], *options, "--json").stdout)["answer"]


def test_errors_are_reported_and_the_exit_code_says_so(run, model, photos, tmp_path) -> None:
    (photos / "gray_l.png").write_text("no picture")
    (photos / "notes.txt").touch()
    out = tmp_path / "out.jsonl"
    result = run("batch", photos, "-o", out, "-p", PROMPT, "-m", model, "--max-new-tokens", 2, code=1)
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"3 rows in {out}")
    assert lines[1] == "1 file in the folders skipped, neither readable images nor videos: 1 .txt"
    assert lines[2] == "fastvlm: 1 row without an answer:"
    assert lines[3].startswith(f"  {photos / 'gray_l.png'}: ") and "not an image" in lines[3]
    assert [row["error"] is None for row in rows_of(out)] == [False, True, True]


def test_stops_and_goes_on(run, model, photos, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    words = ("batch", photos, "-o", out, "-p", PROMPT, "-m", model, "--max-new-tokens", 2, "--batch-size", 1)
    with monkeypatch.context() as patch:
        plain, calls = TransformersEngine.stream, [0]

        def stream(self: Any, *arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == 3:
                raise KeyboardInterrupt
            return plain(self, *arguments)

        patch.setattr(TransformersEngine, "stream", stream)
        stopped = run(*words, code=130)
    kept = f"They are saved in {out}.journal; repeat the command to resume.\n"
    rows = 1 if stopped.stderr.startswith("fastvlm: stopped after 1 row.") else 2  # the second may have ended too
    assert stopped.stderr == f"fastvlm: stopped after {'1 row' if rows == 1 else '2 rows'}. {kept}"
    assert not out.exists()
    other = run(*words, "--temperature", 1, code=2)
    assert "out.jsonl.journal belongs to a run with temperature 0.0, not 1.0." in other.stderr
    done = run(*words)
    assert done.stderr.startswith(f"3 rows in {out} ({rows} of them from earlier runs")
    assert "exists already" in run(*words, code=2).stderr
    assert run(*words, "--restart").stderr.startswith(f"3 rows in {out}")


def test_refuses(model, photos, tmp_path, fails, run) -> None:
    options = ("-p", PROMPT, "-m", model)
    out = tmp_path / "out.jsonl"
    assert "no such file or folder" in fails("batch", tmp_path / "gone", "-o", out, *options)
    assert "ends in .jsonl, .parquet, .srt" in fails("batch", photos, "-o", tmp_path / "out.txt", *options)
    assert "--seed has no effect" in fails("batch", photos, "-o", out, *options, "--seed", 1)
    assert "device is 'abacus'" in fails("batch", photos, "-o", out, *options, "--device", "abacus")
    assert "no such directory" in fails("batch", photos, "-o", out, "-p", PROMPT, "-m", "./gone")
    assert "the inputs have no video" in fails("batch", photos, "-o", out, *options, "--srt", tmp_path)
    assert "--engine" in run("batch", photos, "-o", out, *options, "--engine", "abacus", code=2).stderr
    assert not out.exists() and not (tmp_path / "out.jsonl.journal").exists()


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no SIGKILL")
def test_the_command_killed_at_20_moments(tmp_path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(120):
        image = Image.new("RGB", (64, 48), (index * 29 % 256, 90, 200))
        image.paste((250, 20, index * 31 % 256), (0, 0, 4 + index % 50, 20))
        image.save(photos / f"{index:03}.png")
    (photos / "060.png").write_text("no picture")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> Any:
        words = ["batch", photos, "-o", out, "-p", "What is it?", "-m", tiny_checkpoint(), "--batch-size", "2"]
        command = [sys.executable, "-m", "transformers_fastvlm", *map(str, words), "--max-new-tokens", "8"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def size(journal: Path) -> int:
        return journal.stat().st_size if journal.exists() else 0

    begin = time.monotonic()
    whole = start(tmp_path / "whole.jsonl")
    assert whole.wait() == 1
    duration = time.monotonic() - begin
    draw, killed, out = random.Random(11), 0, tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.journal"
    while killed < 20:
        before = size(journal)
        process = start(out)
        # Loading takes most of the time: now and then kill there, else some time after the journal grows.
        if killed % 5:
            while process.poll() is None and size(journal) <= before:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.1))
        else:
            time.sleep(draw.uniform(0, duration))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            killed += 1
        process.stderr.close()
        if out.exists() and not journal.exists():
            assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
            out.unlink()
    last = start(out)
    assert last.wait() == 1, last.stderr.read()
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not journal.exists()


def test_names_reach_the_terminal_as_text(run, model, tmp_path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "x\x1b[2J\n9 rows in all\u202e.png").write_text("no picture")
    out = tmp_path / "out.jsonl"
    result = run("batch", photos, "-o", out, "-p", PROMPT, "-m", model, code=1)
    assert len(result.stderr.splitlines()) == 3
    assert "x\\x1b[2J\\n9 rows in all\\u202e.png: " in result.stderr
    assert rows_of(out)[0]["source"] == str(photos / "x\x1b[2J\n9 rows in all\u202e.png")


def test_sigterm_stops_and_says_how_to_go_on(run, model, photos, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    words = ("batch", photos, "-o", out, "-p", PROMPT, "-m", model, "--max-new-tokens", 2, "--batch-size", 1)
    plain, calls, before = TransformersEngine.stream, [0], signal.getsignal(signal.SIGTERM)

    def stream(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "stream", stream)
        stopped = run(*words, code=143)
    kept = f"They are saved in {out}.journal; repeat the command to resume.\n"
    rows = 1 if stopped.stderr.startswith("fastvlm: stopped after 1 row.") else 2  # the second may have ended too
    assert stopped.stderr == f"fastvlm: stopped after {'1 row' if rows == 1 else '2 rows'}. {kept}"
    assert signal.getsignal(signal.SIGTERM) == before
    assert run(*words).stderr.startswith(f"3 rows in {out} ({rows} of them from earlier runs")
    assert len(rows_of(out)) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on the size of files stands for the disk")
def test_a_full_disk_is_the_machines_fault_and_names_the_file(run, tmp_path: Path) -> None:
    import resource

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        said = run(
            "batch", tmp_path / "a.png", "-m", "tiny", "-p", "What?", "-o", tmp_path / "out.jsonl", code=1
        ).stderr
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in said and "out.jsonl" in said
    run("batch", tmp_path / "a.png", "-m", "tiny", "-p", "What?", "-o", tmp_path / "out.jsonl")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
