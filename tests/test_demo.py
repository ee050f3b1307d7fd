# SPDX-License-Identifier: Apache-2.0
"""The demo answers offline and says that its words are noise; its picture is the one that the script renders."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = example("demo")
    demo.main(["--out", str(tmp_path / "out.png")])
    printed = capsys.readouterr().out
    assert "$ fastvlm generate" in printed and demo.QUESTION in printed
    assert "words are noise" in printed
    answer = next(line for line in printed.splitlines() if line.startswith("answer ")).split()[1:]
    assert answer and set(answer) <= set(demo.WORDS.split())
    with Image.open(tmp_path / "out.png") as page:
        assert page.width == 960 and page.height > 720 + 150


def test_demo_with_a_checkpoint(tmp_path: Path, checkpoint, golden, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(checkpoint("qwen2_untied")), "--image", str(golden / "images" / "tall_rgb.jpg")]
    example("demo").main([*arguments, "--question", "What is it? " * 12, "--out", str(tmp_path / "out.png")])
    assert "noise" not in capsys.readouterr().out


def test_the_demos_checkpoint_is_laid_out_as_apples(tmp_path: Path) -> None:
    directory = example("demo").build_checkpoint(tmp_path)
    files = {file.name for file in directory.iterdir()}
    assert {"config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"} <= files
    assert not files & {"processor_config.json", "preprocessor_config.json"}
    assert json.loads((directory / "config.json").read_text())["model_type"] == "llava_qwen2"
    shutil.rmtree(directory)


def test_picture_is_rendered_by_its_script() -> None:
    script = example("make_picture")
    assert script.OUT.stat().st_size < 150_000
    with Image.open(script.OUT) as image:
        assert image.size == (script.WIDTH, script.HEIGHT)
        committed = np.asarray(image.resize((40, 30), Image.Resampling.BOX), np.float32)
    rendered = script.make_picture(320, 240).resize((40, 30), Image.Resampling.BOX)
    assert np.abs(np.asarray(rendered, np.float32) - committed).mean() < 8
