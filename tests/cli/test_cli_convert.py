# SPDX-License-Identifier: Apache-2.0
"""`fastvlm convert`: it calls the converter and says what was done. What that does is tested in tests/checkpoints."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from transformers_fastvlm.cli import model_sources


def test_there_and_back(checkpoint, tmp_path, run) -> None:
    source = checkpoint("qwen2_tied")
    done = run("convert", source, tmp_path / "nested", "--to", "transformers")
    assert done.stdout.startswith(f"{tmp_path / 'nested'}: ") and "from apple to transformers" in done.stdout
    assert json.loads((tmp_path / "nested" / "config.json").read_text())["model_type"] == "fastvlm"
    run("convert", tmp_path / "nested", tmp_path / "apple", "--to", "apple")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "apple" / "model.safetensors")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


def test_says_what_was_left_out(copy_of, tmp_path, run) -> None:
    source = copy_of("qwen2_tied")
    (source / "llava_qwen.py").write_text("raise SystemExit")
    (source / "LICENSE").write_text("Apple Machine Learning Research Model ...")
    done = run("convert", source, tmp_path / "out", "--to", "native")
    assert "not copied: llava_qwen.py" in done.stderr and "for research only" in done.stderr
    assert (tmp_path / "out" / "LICENSE").is_file()


def test_from_the_hub(checkpoint, tmp_path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_sources, "read_config", lambda model: {})
    monkeypatch.setattr(model_sources, "licence_of", lambda model: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(checkpoint("qwen2_tied")))
    assert "from apple to transformers" in run("convert", "a/b", tmp_path / "out", "--to", "transformers").stdout


def test_refuses(checkpoint, tmp_path: Path, run, fails) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    source = checkpoint("qwen2_tied")
    assert "not an empty directory" in fails("convert", source, tmp_path / "full", "--to", "apple")
    assert "no such directory" in fails("convert", tmp_path / "gone", tmp_path / "out", "--to", "apple")
    assert "has no config.json" in fails("convert", tmp_path / "full", tmp_path / "out", "--to", "apple")
    assert "--to" in run("convert", source, tmp_path / "out", "--to", "onnx", code=2).stderr
    assert not (tmp_path / "out").exists()
