# SPDX-License-Identifier: Apache-2.0
"""Engines measured behind the seam: how each is loaded, and that every run computes everything anew."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from transformers_fastvlm import FastViTHDModel
from transformers_fastvlm.bench.engine_cases import EngineCase, EngineOptions, engine_cases
from transformers_fastvlm.bench.engine_worker import EngineRunner
from transformers_fastvlm.bench.engines_run import engine_result
from transformers_fastvlm.engines import ENGINES


@pytest.mark.parametrize(
    ("text", "loaded"),
    [
        ("transformers", ("transformers", "tiny", {})),
        ("transformers:bfloat16", ("transformers", "tiny", {"dtype": "bfloat16"})),
        ("transformers:float32=DIRECTORY", ("transformers", "DIRECTORY", {"dtype": "float32"})),
        ("vllm:float32", ("vllm", "tiny", {"dtype": "float32"})),
        ("onnx=DIRECTORY", ("onnx", "DIRECTORY", {})),
        ("onnx:q8=DIRECTORY", ("onnx", "DIRECTORY", {"precision": "q8"})),
    ],
)
def test_what_is_loaded(text: str, loaded: tuple[str, str, dict[str, str]], tmp_path: Path) -> None:
    (case,) = engine_cases([text.replace("DIRECTORY", str(tmp_path))], "tiny")
    assert (case.engine, case.model.replace(str(tmp_path), "DIRECTORY"), case.load_options()) == loaded
    words = " ".join(f"--{name} {value}" for name, value in loaded[2].items())
    assert case.command().endswith(f"-m {case.model} --engine {case.engine} {words}".rstrip())


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_takes_a_precision_by_one_of_two_names(engine: str) -> None:
    assert list(EngineCase(engine, "model", "x").load_options()) in (["dtype"], ["precision"])


def test_every_run_encodes_its_image(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    forward = FastViTHDModel.forward

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        encoded.append(1)
        return forward(self, *args, **options)

    monkeypatch.setattr(FastViTHDModel, "forward", counted)
    case = EngineCase("transformers", "tiny", "float32", "cpu")
    runner = EngineRunner({"engine": asdict(case), "threads": 1, "new_tokens": 3, "image": str(picture)})
    runs = [runner.run() for _ in range(2)]
    runner.close()
    assert len(encoded) == 3, "at the first answer of loading, and in both runs"
    assert [run["tokens"] for run in runs] == [3, 3]
    assert set(runs[0]["seconds"]) == {"preprocess", "first_token", "decode"}


def run_of(first: float, decode: float | None) -> dict[str, Any]:
    seconds = {"preprocess": 0.1, "first_token": first} | ({} if decode is None else {"decode": decode})
    return {"seconds": seconds, "tokens": 1 if decode is None else 5, "peak_bytes": 7, "imports_bytes": 5}


def test_answers_are_compared_at_one_length() -> None:
    case, facts = EngineCase("transformers", "tiny"), {"precision": "float32", "load_seconds": {"engine": 1.0}}
    result = engine_result(case, facts, [run_of(1.0, 0.2), run_of(3.0, 0.4), run_of(2.0, None)], new_tokens=11)
    assert result["answer_seconds"] == pytest.approx(2.0 + 10 * 0.3)
    assert result["tokens_per_second"]["runs"] == 2 and result["seconds"]["first_token"]["median"] == 2.0
    alone = engine_result(case, facts, [run_of(1.0, None)], new_tokens=11)
    assert (alone["answer_seconds"], alone["tokens_per_second"]) == (1.0, None)


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="no engine is named"):
        EngineOptions(())
