# SPDX-License-Identifier: Apache-2.0
"""`fastvlm env`, and what the environment tells every verb."""

import importlib.metadata
import json
import os
import platform

import pytest
import torch
from typer.testing import CliRunner

from transformers_fastvlm import __version__
from transformers_fastvlm.cli import app


def test_env_tells_versions_and_what_changes_how_models_run(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    shown = run("env", "--json").stdout
    found = json.loads(shown)
    assert (found["version"], found["python"]) == (__version__, platform.python_version())
    for package in ("torch", "transformers", "safetensors", "pillow"):
        assert found["packages"][package] == importlib.metadata.version(package)
    assert found["environment"]["OMP_NUM_THREADS"] == "3" and "HF_TOKEN" not in found["environment"]
    assert "secret" not in shown and "another" not in shown
    assert len(found["accelerators"]) == torch.cuda.device_count() + torch.backends.mps.is_available()
    assert found["fast_dtypes"][0] == "float32"


def test_env_prints_one_line_for_each_fact(run) -> None:
    lines = run("env").stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        *("version", "python", "system", "cpu", "cpu instructions", "memory", "fast dtypes", "accelerators"),
        *("packages", "environment"),
    ]
    assert f"torch {torch.__version__.partition('+')[0]}" in lines[8]


def test_the_model_may_stand_in_the_environment(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_MODEL", "tiny")
    assert json.loads(run("info", "--json").stdout) == json.loads(run("info", "tiny", "--json").stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_script_for_completion(shell: str) -> None:
    environment = {"_FASTVLM_COMPLETE": f"source_{shell}"}
    done = CliRunner().invoke(app, [], prog_name="fastvlm", env=os.environ | environment)
    assert done.exit_code == 0 and "_FASTVLM_COMPLETE=complete_" in done.stdout
