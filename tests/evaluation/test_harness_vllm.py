# SPDX-License-Identifier: Apache-2.0
"""`fastvlm eval --engine vllm` gives the answers and the accuracy of Transformers."""

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM and lmms-eval together have an environment of their own: make test-eval")
pytest.importorskip("lmms_eval", reason="the harness is lmms-eval")

from harness_running import fastvlm, finish, kill_after, write_scenes

from transformers_fastvlm.evaluation.eval_run import JOURNAL
from transformers_fastvlm.evaluation.results import EvaluationRun, read_run

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep vLLM from binding itself to cores that other tests use."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def evaluation(data: Path, engine: str, out: Path, batch: int) -> tuple[Any, ...]:
    command = ("eval", "tiny", "--engine", engine, "--data", data, "--out", out, "--batch", batch)
    return (*command, "--dtype", "float32", "--max-new-tokens", 16, "--no-page", "--no-first-token")


def table(run: EvaluationRun) -> Any:
    return run.tasks, sorted(run.samples, key=lambda sample: sample.doc_id)


def test_answers_and_accuracy_are_those_of_transformers(tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", 24)
    printed = [finish(fastvlm(*evaluation(data, name, tmp_path / name, 9))) for name in ("transformers", "vllm")]
    expected, found = (read_run(tmp_path / name) for name in ("transformers", "vllm"))
    assert (found.engine, found.dtype) == ("vllm", "float32")
    assert table(found) == table(expected) and printed[0] == printed[1]
    assert found.tasks["scenes"].score > 80


@pytest.mark.soak
def test_500_scenes_with_kills(tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", 500)
    for name in ("transformers", "vllm"):
        command = evaluation(data, name, tmp_path / name, 16)
        if name == "vllm":
            for lines in sorted(random.sample(range(1, 31), 2)):
                kill_after(fastvlm(*command), tmp_path / name / JOURNAL, lines)
        finish(fastvlm(*command))
    assert table(read_run(tmp_path / "vllm")) == table(read_run(tmp_path / "transformers"))
