# SPDX-License-Identifier: Apache-2.0
"""Devices of onnxruntime's sessions: what a name stands for, and refusals that say what to do."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

onnx = pytest.importorskip("onnx", reason="the export to ONNX is an extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="the export to ONNX is an extra")
pytest.importorskip("onnxscript", reason="the export to ONNX is an extra")

from onnx_cases import tiny_export  # noqa: E402

from transformers_fastvlm.cli import app  # noqa: E402
from transformers_fastvlm.engines import OnnxEngine  # noqa: E402
from transformers_fastvlm.engines.onnx_engine import OnnxModel  # noqa: E402
from transformers_fastvlm.engines.onnx_sessions import open_session, session_device  # noqa: E402

EXPECTED = r"expected auto, cpu, cuda \(or cuda:1 and so on\), directml or coreml"
# Device, provider, and what brings the provider.
LACKING = [
    ("cuda", "CUDAExecutionProvider", "Install onnxruntime-gpu in place of onnxruntime"),
    ("cuda:1", "CUDAExecutionProvider", "Install onnxruntime-gpu in place of onnxruntime"),
    ("directml", "DmlExecutionProvider", "Install onnxruntime-directml in place of onnxruntime"),
    ("coreml", "CoreMLExecutionProvider", "Install onnxruntime on macOS"),
]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A graph that adds a number to itself."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy")
    made = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "twice", [x], [y])
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(made, opset_imports=opset, ir_version=10), tmp_path / "twice.onnx")
    return tmp_path / "twice.onnx"


def test_a_session_has_the_device_and_the_threads(graph: Path) -> None:
    session = open_session(graph, threads=3, prepack=False)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_session_options().intra_op_num_threads == 3
    (twice,) = session.run(None, {"x": np.array([2.0], dtype=np.float32)})
    assert twice == [4.0]


@pytest.mark.parametrize("name", ["abacus", "mps", "gpu", "cpu:1", "coreml:0", "cuda:", "cuda:x", "CUDA", ""])
def test_an_unknown_device(graph: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"device is '{name}'; {EXPECTED}"):
        open_session(graph, device=name)


@pytest.mark.parametrize(("name", "provider", "cure"), LACKING)
def test_a_device_that_the_package_lacks(graph: Path, name: str, provider: str, cure: str) -> None:
    available = onnxruntime.get_available_providers()
    if provider in available:
        pytest.skip(f"this onnxruntime has {provider}")
    with pytest.raises(ValueError, match=f"device is '{name}', but .* no {provider}; it has {', '.join(available)}"):
        open_session(graph, device=name)
    with pytest.raises(ValueError, match=cure):
        OnnxModel(tiny_export().directory, device=name)


def test_auto_is_what_the_engine_says_that_it_uses() -> None:
    engine = OnnxEngine(tiny_export().directory, "float32")
    assert engine.device == session_device("auto") == session_device(engine.device)
    providers = engine.model.session("embed_tokens").get_providers()
    assert engine.device == {"CUDAExecutionProvider": "cuda", "DmlExecutionProvider": "directml"}.get(
        providers[0], "cpu"
    )
    engine.close()


@pytest.mark.parametrize("verb", ["generate", "chat", "batch"])
def test_the_command_takes_a_device(verb: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"image": "none.png"}\n')
    files = [str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "answers.jsonl"), "-p", "?"]
    words = {"generate": ["-p", "?", "--max-new-tokens", "2"], "chat": [], "batch": files}[verb]
    words = [verb, *words, "-m", str(tiny_export().directory), "--engine", "onnx", "--device"]
    for device in ("abacus", "cuda"):
        if device == "abacus" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            refused = CliRunner().invoke(app, [*words, device], input="?\n")
            assert refused.exit_code == 2 and f"--device is '{device}'" in refused.stderr, refused.stderr
    if verb == "generate":
        assert CliRunner().invoke(app, [*words, "cpu"]).exit_code == 0
