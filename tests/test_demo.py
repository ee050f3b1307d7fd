# SPDX-License-Identifier: Apache-2.0
"""The demo answers offline and correctly; its images are those that the script draws."""

import importlib.util
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
    assert "$ fastvlm generate" in printed
    answers = [line.split(maxsplit=1)[1] for line in printed.splitlines() if line.startswith("answer ")]
    assert answers == ["628", "CAT", "right", "4", "3", "orange"]
    with Image.open(tmp_path / "out.png") as page:
        assert page.width > 3 * demo.CELL and page.height > demo.CELL


def test_demo_with_a_checkpoint(tmp_path: Path, checkpoint, golden, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(checkpoint("qwen2_untied")), "--image", str(golden / "images" / "tall_rgb.jpg")]
    example("demo").main([*arguments, "--question", "What is it? " * 12, "--out", str(tmp_path / "out.png")])
    printed = capsys.readouterr().out
    assert printed.count("answer ") == 1 and "What is it?" in printed


def test_images_are_drawn_by_their_script() -> None:
    script = example("make_images")
    assert {file.name for file in script.IMAGES.iterdir()} == set(script.SCENES)
    for name in script.SCENES:
        assert (script.IMAGES / name).stat().st_size < 150_000
        with Image.open(script.IMAGES / name) as image:
            committed = np.asarray(image, np.int16)
        drawn = np.asarray(script.scene_of(name).image, np.int16)
        assert drawn.shape == committed.shape
        # Versions of Pillow place glyphs and blur edges a little differently.
        assert np.abs(drawn - committed).mean() < 2
