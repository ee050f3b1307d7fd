# SPDX-License-Identifier: Apache-2.0
"""The programs of docs/export.md and of an export's model card run as they stand there."""

import re
from pathlib import Path

import pytest
from PIL import Image

from test_readme import ROOT, blocks

pytest.importorskip("onnx", reason="the export to ONNX is an extra")
pytest.importorskip("onnxruntime", reason="the export to ONNX is an extra")
pytest.importorskip("onnxscript", reason="the export to ONNX is an extra")

from onnx_cases import pytorch_answer, tiny_export


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the programs name."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-onnx", "DIRECTORY"):
        (tmp_path / name).symlink_to(tiny_export().directory)
    Image.new("RGB", (200, 256), "red").save("image.jpg")
    return tmp_path


def test_the_pages_program(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (block,) = [block for block in blocks(text) if block.needs == "onnx"]
    exec(compile("\n" * (block.line - 1) + block.code, "export.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.splitlines() == re.findall(r"# prints: (.*)$", block.code, flags=re.M) == ["628"]


def test_the_cards_program(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for block in blocks((Path("DIRECTORY") / "README.md").read_text()) if block.language == "python"]
    exec(compile(block.code, "README.md", "exec"), {"__name__": "__main__"})
    answer = pytorch_answer(Image.open("image.jpg"), "Describe the image.", 512)[1]
    assert capsys.readouterr().out.strip() == answer
