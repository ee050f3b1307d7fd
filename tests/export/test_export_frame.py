# SPDX-License-Identifier: Apache-2.0
"""The frame around every target: what is refused, what is left behind, and what the model card says."""

import hashlib
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.cli import main
from transformers_fastvlm.export import TARGETS, Report, Target, export


def write(source: Any, out: Path, options: Any) -> Report:
    """Write a file, as a target does."""
    options.say("writing")
    (out / "weights").mkdir()
    (out / "weights" / "data").write_bytes(b"12345")
    return Report(
        checked_in="plain 1.0",
        errors={"logits": 1.25e-7},
        how_to_run="```bash\nplain run\n```",
        limits=("It has no colours.",),
    )


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A target called "plain", whose module is this one's `write`."""
    module = ModuleType("transformers_fastvlm.export.plain_target")
    module.write = write  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    row = Target(summary="a plain file", module="plain_target", precisions=("float32", "q4"), sizes="one")
    monkeypatch.setitem(TARGETS, "plain", row)
    return module


def digest(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


def test_every_target_has_its_module() -> None:
    for name, row in TARGETS.items():
        assert importlib.util.find_spec(f"transformers_fastvlm.export.{row.module}") is not None, name


@pytest.mark.usefixtures("plain")
def test_what_is_written(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("qwen2_tied"), source)
    (source / "LICENSE").write_text("Apple Machine Learning Research Model is licensed under …")
    before, said = digest(source), []
    done = export(
        "plain", source, tmp_path / "deep" / "out", precision="q4", name="apple/FastVLM-0.5B", say=said.append
    )
    assert digest(source) == before
    assert said == ["writing"]
    assert done.precisions == ("q4",)
    assert done.files.keys() == {"LICENSE", "README.md", "weights/data"}
    assert done.files["weights/data"] == 5
    card = (done.directory / "README.md").read_text()
    for text in (
        "license_name: apple-amlr",
        "base_model: apple/FastVLM-0.5B",
        "for research only",
        "`fastvlm export plain`",
        "plain run",
        "Precision: q4.",
        "Checked in plain 1.0.",
        "| logits | 1.25e-07 |",
        "It has no colours.",
    ):
        assert text in card


@pytest.mark.usefixtures("plain")
def test_the_tiny_model_is_under_the_packages_licence(tmp_path: Path) -> None:
    done = export("plain", tiny_checkpoint(), tmp_path / "out")
    card = (done.directory / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "research only" not in card


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "onyx"}, "'onyx'; expected one of onnx, .*plain"),
        ({"precision": "q3"}, "'q3'; for the target 'plain' expected one of float32, q4"),
        ({"precision": ("q4", "float32")}, "2 precisions were given; 'plain' takes one of float32, q4"),
        ({"target": "apple", "precision": "q4"}, "keeps the checkpoint's"),
        ({"sizes": (100,)}, "size is 100; expected a multiple of 64 from 64 to 2048"),
        ({"sizes": (256, 512)}, "takes one"),
        ({"target": "apple", "sizes": (256,)}, "take images of every size"),
        ({"external_data": True}, "for the target 'onnx'"),
    ],
)
def test_unknown_choices_list_the_valid_ones(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(**{"target": "plain", "model": tiny_checkpoint(), "out": tmp_path / "out", **options})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Target(summary="nothing", module="plain_target", extra="plain", packages=("no_such_package_here",))
    monkeypatch.setitem(TARGETS, "plain", row)
    with pytest.raises(ImportError, match=r'no_such_package_here: pip install "transformers-fastvlm\[plain\]"'):
        export("plain", tiny_checkpoint(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_export_leaves_nothing(
    plain: ModuleType, tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Any, out: Path, options: Any) -> Report:
        write(source, out, options)
        raise error

    monkeypatch.setattr(plain, "write", interrupted)
    with pytest.raises(error):
        export("plain", tiny_checkpoint(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("plain")
def test_nothing_is_overwritten(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        export("plain", tiny_checkpoint(), out)
    assert (out / "mine").read_text() == "kept"
    source = tmp_path / "source"
    shutil.copytree(checkpoint("qwen2_tied"), source)
    with pytest.raises(ValueError, match="is inside the checkpoint"):
        export("plain", source, source / "out")
    assert not (source / "out").exists()


@pytest.mark.usefixtures("plain")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", "plain", "tiny", str(tmp_path / "out"), "--precision", "q4", "--size", "256"])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert "logits: relative error 1.25e-07" in captured.err
    assert "README.md" in captured.err
    assert captured.out.startswith(f"{tmp_path / 'out'}: 0.0 MB for plain, q4")
    with pytest.raises(SystemExit) as ended:
        main(["export", "onyx", "tiny", str(tmp_path / "other")])
    assert ended.value.code == 2
    assert "expected one of onnx" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # of the targets' packages
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("onnx", {"precision": "float32"}),
        ("onnx", {"precision": ["q8", "q4f16"]}),
        ("gguf", {"precision": ["q8_0", "q4_0"]}),
        ("coreml", {"sizes": (256, 512)}),
        ("mlx", {}),
        ("apple-app", {}),
        ("executorch", {}),
        ("apple", {}),
        ("native", {}),
    ],
)
def test_progress_counts_to_the_steps_of_the_target(target: str, options: dict[str, Any], tmp_path: Path) -> None:
    for package in (*TARGETS[target].packages, *(("timm",) if target == "native" else ())):
        pytest.importorskip(package)
    shown: list[tuple[int, int, str]] = []
    said: list[str] = []
    export(
        target,
        tiny_checkpoint(),
        tmp_path / "out",
        say=said.append,
        progress=lambda *step: shown.append(step),
        **options,
    )
    assert [doing for _, _, doing in shown] == said
    assert [done for done, _, _ in shown] == list(range(len(said)))
    (total,) = {total for _, total, _ in shown}
    merges = target in ("apple", "native")  # and tiny is merged already
    assert total == len(said) + merges
