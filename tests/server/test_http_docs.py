# SPDX-License-Identifier: Apache-2.0
"""The first requests of docs/serve.md get the answers that the page says."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_readme import ROOT, blocks

pytest.importorskip("fastapi", reason="the server is an extra")
pytest.importorskip("openai", reason="OpenAI's client is what the page uses")

from http_running import Running, running

from transformers_fastvlm.engines.model_loading import find_device, load_model

PAGE = ROOT / "docs" / "serve.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(*load_model("tiny", find_device("cpu"))) as started:
        yield started


@pytest.fixture
def page(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's text, with the URL of the server that runs, in a directory like a checkout."""
    shutil.copytree(ROOT / "examples" / "images", tmp_path / "examples" / "images")
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    assert ADDRESS in text
    return text.replace(ADDRESS, server.url)


def test_the_program(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for block in blocks(page) if block.needs == "openai"]
    exec(compile("\n" * (block.line - 1) + block.code, PAGE.name, "exec"), {"__name__": "__main__"})
    expected = re.findall(r"# prints: (.*)$", block.code, flags=re.M)
    assert expected == ["orange"]
    assert capsys.readouterr().out.split() == expected * 2  # whole, and streamed


def test_the_command(page: str, server: Running) -> None:
    (block,) = [block for block in blocks(page) if "curl " in block.code]
    environment = os.environ | {"NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        ["bash", "-c", block.code], capture_output=True, text=True, timeout=300, env=environment, check=True
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"].strip() == "orange"
    assert "content` is `orange`" in page
