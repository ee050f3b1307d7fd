# SPDX-License-Identifier: Apache-2.0
"""The command as a whole: as a process of its own, its help, its errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from helpers import WARNINGS_ARE_ERRORS, own_words
from transformers_fastvlm import __version__
from transformers_fastvlm.cli import cli_errors

VERBS = (
    *("generate", "chat", "info", "convert", "export", "new", "train", "merge", "data"),
    *("batch", "serve", "demo", "bench", "eval", "eval-report", "eval-encoder", "embed", "env"),
)


def process(
    *words: str | Path, python: tuple[str, ...] = ("-m", "transformers_fastvlm")
) -> subprocess.CompletedProcess:
    """Run in a new interpreter that turns warnings into errors, without a network."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *WARNINGS_ARE_ERRORS, *python, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_answers_in_a_process_of_its_own(checkpoint, golden) -> None:
    done = process(
        "generate",
        golden / "images" / "tall_rgb.jpg",
        "-p",
        "What is it?",
        "-m",
        checkpoint("llama"),
        "--max-new-tokens",
        4,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n") and done.stdout.strip()
    # Nothing but this: no warnings, and no progress bars where nobody is looking.
    assert (
        own_words(done.stderr) == "fastvlm: the answer was cut after 4 tokens; --max-new-tokens allows longer ones.\n"
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_and_fits(run, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(verb, "--help").stdout
    assert re.search(r"[{}]", re.sub(r"\{\{?column\}?\}|\{question\}", "", shown)) is None, "syntax of Typer"
    examples = re.findall(rf"^ +fastvlm {verb}\b.*\n *(.*)$", shown.partition("Examples:")[2], re.MULTILINE)
    assert not any(examples), "an example that takes two lines cannot be copied"
    assert len(re.findall(rf"^ +fastvlm {verb}\b", shown.partition("Examples:")[2], re.MULTILINE)) in (2, 3)
    lines = shown.splitlines()
    assert len(lines) <= 90 and max(map(len, lines)) <= 80


def test_version(run) -> None:
    assert run("--version").stdout == run("-V").stdout == f"fastvlm {__version__}\n"


def test_without_a_verb_shows_all_of_them_in_groups(run) -> None:
    shown = run(code=2)
    lines = re.findall(r"^[│|] ([a-z][a-z-]*) ", shown.stdout + shown.stderr, re.MULTILINE)
    assert sorted(lines) == sorted(VERBS)


def test_errors_of_the_program_are_one_line_unless_debug(capsys: pytest.CaptureFixture[str]) -> None:
    @cli_errors.reports_errors
    def broken(debug: bool) -> None:
        raise KeyError("lost")

    with pytest.raises(typer.Exit) as stop:
        broken(debug=False)
    assert stop.value.exit_code == 1
    assert capsys.readouterr().err == "fastvlm: KeyError: 'lost' (--debug shows where)\n"
    with pytest.raises(KeyError):
        broken(debug=True)


def test_out_of_memory_says_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    @cli_errors.reports_errors
    def large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMuch more text.")

    with pytest.raises(typer.Exit) as stop:
        large()
    assert stop.value.exit_code == 1
    assert "--size" in capsys.readouterr().err


def test_interrupting_ends_quietly() -> None:
    @cli_errors.reports_errors
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as stop:
        interrupted()
    assert stop.value.exit_code == 130


def test_debug_lets_the_exception_through(run) -> None:
    with pytest.raises(cli_errors.UserError):
        raise run("info", "no/such/dir", "--debug", code=1).exception
