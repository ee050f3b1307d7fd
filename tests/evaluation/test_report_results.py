# SPDX-License-Identifier: Apache-2.0
"""The directory of an evaluation: what was written is read, and whatever is wrong with it is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from transformers_fastvlm.evaluation.results import EvaluationRun, Sample, TaskResult, read_run, write_run


def sample(**changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "task": "t",
        "doc_id": 0,
        "question": "How high?\nOne word.",
        "answers": ("3", "three"),
        "given": "3\u2028",
        "score": 1.0,
        "images": ("a/0.png",),
    }
    return Sample(**fields | changes)


def run_of(*samples: Sample) -> EvaluationRun:
    return EvaluationRun(
        model="m",
        engine="transformers",
        dtype="float32",
        settings={"batch": 16, "tasks": ["t"]},
        versions={"torch": "2"},
        tasks={"t": TaskResult(metric="exact_match", score=50.0, count=len(samples), raw={"exact": 0.5})},
        seconds={"total": 2.0, "generate": 1},
        time_to_first_token=None,
        samples=samples,
    )


def test_what_was_written_is_read(tmp_path: Path) -> None:
    run = run_of(sample(), sample(doc_id="0", given="", score=0, answers=(), images=()))
    write_run(tmp_path / "run", run)
    assert read_run(tmp_path / "run") == run
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["results.json", "samples.jsonl"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["tasks"] == {
        "t": {"metric": "exact_match", "score": 50.0, "count": 2, "raw": {"exact": 0.5}}
    }
    half = run_of(sample(question="half a character: \ud83d"))
    write_run(tmp_path / "run", half)
    assert read_run(tmp_path / "run") == half


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (sample(score=1.5), "score is '1.5'"),
        (sample(score=float("nan")), "score is 'nan'"),
        (sample(images=("../secret.png",)), "images is '../secret.png'"),
        (sample(images=("/etc/passwd",)), "images is '/etc/passwd'"),
        (sample(images=("a\\..\\b",)), "forward slashes"),
        (sample(task="other"), "task '(other|t)' has"),
        (sample(doc_id=True), "doc_id is 'True'"),
        (sample(given=None), "given is 'None'"),
    ],
)
def test_nothing_is_written_that_could_not_be_read(tmp_path: Path, bad: Sample, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_run(tmp_path / "run", run_of(sample(doc_id=7), bad))
    assert not (tmp_path / "run").exists()


def test_a_sample_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample 0 of task 't' occurs twice"):
        write_run(tmp_path, run_of(sample(), sample()))


def test_an_interrupted_second_run_is_not_taken_for_a_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, run_of(sample()))
    from transformers_fastvlm.evaluation import results

    def stop(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path, run_of(sample(), sample(doc_id=1)))
    assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]
    with pytest.raises(FileNotFoundError, match=r"no results\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("file", "before", "after", "words"),
    [
        ("results.json", '"score": 50.0', '"score": 500', "task 't': score is '500'"),
        ("results.json", '"count": 1', '"count": 2', "has 1 samples, but results.json counts 2"),
        ("results.json", '"engine"', '"motor"', "missing keys: engine; unknown keys: motor"),
        ("results.json", "}", "", "results.json is not valid JSON"),
        ("results.json", '"total": 2.0', '"total": -1', "seconds, total is '-1'"),
        ("samples.jsonl", '"task"', "task", "samples.jsonl, line 1 is not valid JSON"),
        ("samples.jsonl", '"given": "3', '"given": 3, "x": "', "line 1: missing keys: none; unknown keys: x"),
        ("samples.jsonl", '["3", "three"]', '"3"', "answers is '3' .str.; expected a list of texts"),
    ],
)
def test_damage_is_named(tmp_path: Path, file: str, before: str, after: str, words: str) -> None:
    write_run(tmp_path, run_of(sample()))
    text = (tmp_path / file).read_text()
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after))
    with pytest.raises(ValueError, match=words):
        read_run(tmp_path)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        read_run(tmp_path / "nothing")
