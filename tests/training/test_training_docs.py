# SPDX-License-Identifier: Apache-2.0
"""What docs/training.md and docs/training-recipes.md show works: their programs run, with `-m soak` their commands."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from test_readme import HUB_NAME, MARK, ROOT, blocks, commands

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

PAGES = [ROOT / "docs" / name for name in ("training.md", "training-recipes.md")]
QWEN = "Qwen/Qwen3-0.6B"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),  # of PyTorch, where there is no GPU
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning"),  # of TRL, with Transformers 5.23
]


@pytest.fixture
def folder(golden: Path, golden_batches: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the page names."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.json", "val.json"):
        (tmp_path / name).write_text(json.dumps(golden_batches["sft"]["samples"]))
    (tmp_path / "captions.json").write_text(json.dumps(golden_batches["plain"]["samples"]))
    shutil.copytree(golden / "images", tmp_path / "images")
    for file in (golden / "images").iterdir():
        shutil.copy(file, tmp_path)
    shutil.copy(golden / "images" / "large_rgb.jpg", tmp_path / "photo.jpg")
    shutil.copytree(ROOT / "examples" / "images", tmp_path / "examples" / "images")
    return tmp_path


def run_blocks(mark: str, count: int, model: Path, namespace: dict[str, Any]) -> None:
    texts = [page.read_text(encoding="utf-8").replace(MARK, "").replace(mark, MARK) for page in PAGES]
    marked = [(page, block) for page, text in zip(PAGES, texts, strict=True) for block in blocks(text) if block.marked]
    assert len(marked) == count
    for page, block in marked:
        code = block.code.replace(HUB_NAME, model.as_posix())
        exec(compile("\n" * (block.line - 1) + code, page.name, "exec"), namespace)


def test_the_programs_run(folder: Path, checkpoint: Callable[[str], Path]) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    run_blocks("<!-- test with accelerate -->", 3, checkpoint("qwen2_tied"), namespace)
    assert (folder / "my-model" / "config.json").is_file() and (folder / "new" / "config.json").is_file()
    pytest.importorskip("trl", reason="needs TRL")
    model = namespace["AutoModelForImageTextToText"].from_pretrained(checkpoint("qwen2_tied"))
    processor = namespace["AutoProcessor"].from_pretrained(checkpoint("qwen2_tied"))
    run_blocks("<!-- test with trl -->", 1, folder, {**namespace, "model": model, "processor": processor})


def test_the_plan_is_printed_as_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from transformers_fastvlm.cli import app

    monkeypatch.chdir(tmp_path)
    page = PAGES[0].read_text(encoding="utf-8")
    (rows,) = [block for block in blocks(page) if block.marked]
    exec(compile(rows.code, "training.md", "exec"), {"__name__": "__main__"})
    (shown,) = [block for block in blocks(page) if block.language == "text" and "output   my-model" in block.code]
    lines = []
    for words in commands(page):
        if words[:3] == ["fastvlm", "data", "check"] or "--dry-run" in words:
            result = CliRunner().invoke(app, words[1:], prog_name="fastvlm")
            assert result.exit_code == 0, (words, result.stderr)
            lines += (result.stdout + result.stderr).splitlines()
    depends = ("compute", "memory")  # on the machine
    expected = [line for line in shown.code.splitlines() if line and not line.startswith(depends)]
    assert [line for line in lines if not line.startswith(depends)] == expected


def test_the_last_lines_have_the_labels_of_a_run(folder: Path, checkpoint: Callable[[str], Path]) -> None:
    from transformers_fastvlm.training.ending import ending

    (shown,) = [
        block
        for block in blocks(PAGES[0].read_text(encoding="utf-8"))
        if block.language == "text" and "finished: " in block.code
    ]
    lines = shown.code.splitlines()
    history = [
        {"loss": float(loss), "step": int(step)}
        for step, loss in re.findall(r"^step (\d)/4: loss ([\d.]+)", shown.code, re.M)
    ]
    assert len(history) == 4
    told = list(ending(Path("my-model"), history, 0.0, 4, None))
    loss = next(line for line in told if line.startswith("loss"))
    assert loss in lines and told[0] in lines
    assert [line.split()[0] for line in lines[lines.index(told[0]) :]] == [line.split()[0] for line in told]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_the_commands_run(folder: Path, checkpoint: Callable[[str], Path]) -> None:
    from typer.testing import CliRunner

    from transformers_fastvlm.cli import app

    tiny = str(checkpoint("qwen2_tied"))
    shorter = [
        "arguments.use_cpu=true",
        "arguments.max_steps=2",
        "arguments.per_device_train_batch_size=1",
        "train.global_batch_size=2",
        "data.max_length=2048",  # a tiny model's context holds 4096
    ]
    ran = 0
    for command in commands("\n".join(page.read_text(encoding="utf-8") for page in PAGES)):
        if command[0] != "fastvlm" or len(command) == 2:  # a verb that is only named
            continue
        words = [word.replace(HUB_NAME, tiny).replace(QWEN, tiny) for word in command[1:]]
        into = None
        if ">" in words:
            words, into = words[: words.index(">")], words[words.index(">") + 1]
        if words[0] == "train" and not {"--list", "--show"} & set(words):
            words += [*shorter, "model.image_size=64"]
            if "mine.yaml" in words:
                words += [f"model.path={tiny}", "data.source=train.json", "output_dir=my-model"]
            if "--resume" not in words:
                shutil.rmtree(folder / "my-model", ignore_errors=True)
        result = CliRunner().invoke(app, words, prog_name="fastvlm")
        assert result.exit_code == 0, (words, result.stdout, result.stderr)
        if into is not None:
            (folder / into).write_text(result.stdout)
        ran += 1
    assert ran >= 15
    assert (folder / "stage3" / "config.json").is_file()
