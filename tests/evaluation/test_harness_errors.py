# SPDX-License-Identifier: Apache-2.0
"""What cannot be evaluated is an error of one clear sentence, where lmms-eval itself would exit with 0."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import transformers_fastvlm_entry
from transformers_fastvlm.cli import app
from transformers_fastvlm.evaluation import lmms_model

pytest.importorskip("lmms_eval", reason="the harness is lmms-eval")
pytestmark = pytest.mark.filterwarnings("default")


def refusal(*words: str | Path, code: int = 2) -> str:
    """Run `fastvlm eval` and return the one line that it says."""
    result = CliRunner().invoke(app, ["eval", *map(str, words)], prog_name="fastvlm")
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    lines = result.stderr.splitlines()
    assert result.stdout == "" and len(lines) == 1 and lines[0].startswith("fastvlm: "), result.stderr
    return lines[0]


def test_an_unknown_task_and_names_near_it(tmp_path: Path) -> None:
    said = refusal("tiny", "--tasks", "chartqua", "--out", tmp_path)
    assert "unknown task 'chartqua'. Similar names: chartqa" in said
    assert "fastvlm: unknown task 'qqqqqqqqq'. There is no similar name." in refusal(
        "tiny", "--tasks", "qqqqqqqqq", "--out", tmp_path
    )


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    said = refusal("tiny", "--tasks", "realworldqa", "--out", tmp_path)
    assert "no network for task realworldqa: its data set lmms-lab-encoder/RealWorldQA is not in the cache" in said


def test_a_task_without_answers(tmp_path: Path) -> None:
    assert "task docvqa_test has no answers" in refusal("tiny", "--tasks", "docvqa_test", "--out", tmp_path)


def test_a_task_that_is_not_answered_by_generating(tmp_path: Path) -> None:
    assert "task seedbench_ppl has output_type multiple_choice" in refusal(
        "tiny", "--tasks", "seedbench_ppl", "--out", tmp_path
    )


def local_task(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    from transformers_fastvlm.evaluation.tasks import expand

    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(folder / "data.parquet")
    place = {"data_files": {"test": str(folder / "data.parquet")}, "cache_dir": str(folder / "cache")}
    (folder / "local.yaml").write_text(
        f"include: {expand(['realworldqa'])['realworldqa']}\ntask: local\ndataset_path: parquet\n"
        f"dataset_kwargs: {json.dumps(place)}\n"
    )
    return folder


def test_a_task_whose_column_of_answers_is_empty(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"question": "What?", "answer": "", "image": str(tmp_path / "a.png")}] * 2
    said = refusal("tiny", "--tasks", "local", "--include", local_task(tmp_path, rows), "--out", tmp_path / "out")
    assert "task local has no answers: the column answer of parquet is empty" in said


def test_an_image_of_a_task_that_cannot_be_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    good = {"bytes": (tmp_path / "good.png").read_bytes(), "path": None}
    rows = [
        {"question": "First?", "answer": "A", "image": good},
        {"question": "Second?", "answer": "A", "image": {"bytes": b"not a picture", "path": None}},
    ]
    said = refusal("tiny", "--tasks", "local", "--include", local_task(tmp_path, rows), "--out", tmp_path / "out")
    assert "task local, row 1 has an image that cannot be read" in said


def test_a_model_that_is_not_fastvlm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    said = refusal(tmp_path, "--tasks", "chartqa", "--out", tmp_path / "out")
    assert "has model_type 'bert'; expected a FastVLM" in said
    assert "no such directory" in refusal(tmp_path / "gone", "--tasks", "chartqa", "--out", tmp_path / "out")


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    assert "give either --tasks, such as card, or --data" in refusal("tiny", "--out", tmp_path)
    assert "give either --tasks" in refusal(
        "tiny", "--tasks", "card", "--data", tmp_path / "a.jsonl", "--out", tmp_path
    )
    words = ["eval", "tiny", "--tasks", "card", "--engine", "abacus", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words, prog_name="fastvlm")
    assert result.exit_code == 2 and "'abacus' is not one of" in " ".join(result.stderr.replace("│", " ").split())
    said = refusal("tiny", "--data", tmp_path / "a.jsonl", "--precision", "q4", "--out", tmp_path)
    assert "--precision is for --engine onnx" in said


def test_lmms_eval_takes_the_model_from_the_entry_point() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(transformers_fastvlm_entry.lmms_eval_manifest())
    found = registry.get_model_class("fastvlm")
    assert found is lmms_model.FastVLM and found.is_simple is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"engine": "abacus"}, "engine is 'abacus'"),
    ],
)
def test_arguments_that_lmms_eval_passes_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lmms_model.FastVLM(pretrained="tiny", **options)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        lmms_model.FastVLM(pretrained="tiny")
