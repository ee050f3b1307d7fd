# SPDX-License-Identifier: Apache-2.0
"""The notebooks of examples/ run from the first cell to the last with the tiny model, in a process of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def run(path: Path, folder: Path) -> str:
    """Run the code cells of a notebook as one program in `folder` and return what they print."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    (folder / "notebook.py").write_text("import torch\ntorch.set_num_threads(1)\n" + code, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "notebook.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_questions_are_answered(tmp_path: Path) -> None:
    expected = ["628", "CAT", "628 - images encoded: 1", "CAT - images encoded: 0", "628"]
    assert run(ROOT / "examples" / "ask.ipynb", tmp_path).splitlines() == expected


def test_fine_tuning_helps(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    printed = run(ROOT / "examples" / "finetune.ipynb", tmp_path)
    before, after = (int(number) for number in re.findall(r"^right \w+: (\d+)%$", printed, flags=re.M))
    assert after >= 80 > before
    assert (tmp_path / "dice-model" / "config.json").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_have_no_output_and_say_how_to_use_another_model(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert [cell for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count")] == []
    first = "".join(notebook["cells"][0]["source"])
    assert "Colab" in first and "apple/FastVLM-0.5B" in first
