# SPDX-License-Identifier: Apache-2.0
"""The script that makes the package's tiny model, through all its parts with one step in each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import transformers_fastvlm
from transformers_fastvlm.checkpoints import tiny_checkpoint

for package in ("accelerate", "datasets"):
    pytest.importorskip(package, reason=f"training needs {package}")

SOURCES = str(Path(transformers_fastvlm.__file__).parents[1])
SCRIPT = Path(__file__).parents[2] / "examples" / "train_tiny.py"


@pytest.mark.soak
def test_all_parts_lead_to_files_like_those_of_the_package(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "work"), "--steps", "1", "--out", str(tmp_path / "tiny")]
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert first.returncode == 0, first.stderr[-3000:]
    made, shipped = tmp_path / "tiny", Path(tiny_checkpoint())
    assert {file.name for file in made.iterdir()} <= {file.name for file in shipped.iterdir()}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((made / name).read_text()) == json.loads((shipped / name).read_text()), name
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (made, shipped)]
    assert abs(sizes[0] - sizes[1]) < 1000, sizes
    stages = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").glob("*/model.safetensors")}
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {file: file.stat().st_mtime_ns for file in stages} == stages, "a part that was done ran again"
