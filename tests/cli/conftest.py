# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the command's tests: running it in this process, and a checkpoint that it answers with."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from transformers_fastvlm.cli import app

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    """Run `fastvlm` with these words; the result has `exit_code`, `stdout` and `stderr`."""

    def call(*words: str | Path, stdin: str | bytes = "", code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(word) for word in words], input=stdin, prog_name="fastvlm")
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
        return result

    return call


@pytest.fixture
def fails(run: Run) -> Callable[..., str]:
    """Run `fastvlm` with input that it cannot use and return what it says: one line, nothing on standard output."""

    def call(*words: str | Path, stdin: str | bytes = "") -> str:
        result = run(*words, stdin=stdin, code=2)
        lines = result.stderr.splitlines()
        assert result.stdout == "" and len(lines) == 1 and lines[0].startswith("fastvlm: "), result.stderr
        return lines[0]

    return call


@pytest.fixture
def copy_of(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a tiny checkpoint that a test may change."""
    return lambda name: Path(shutil.copytree(checkpoint(name), tmp_path / name))
