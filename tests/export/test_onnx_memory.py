# SPDX-License-Identifier: Apache-2.0
"""Memory and size of the export of a model of the 0.5B shape."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx", reason="the export to ONNX is an extra")
pytest.importorskip("onnxruntime", reason="the export to ONNX is an extra")
pytest.importorskip("onnxscript", reason="the export to ONNX is an extra")

from transformers_fastvlm import FastVLMConfig
from transformers_fastvlm.bench.random_weights import random_model
from transformers_fastvlm.tokens import image_token_id_of

# The size of pictures changes neither weights nor graphs, and a small one keeps the test short.
EXPORT = """
import json, resource, sys
from transformers_fastvlm.export import export
done = export("onnx", sys.argv[1], sys.argv[2], precision=sys.argv[3], sizes=(256,))
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak": peak, "bytes": done.num_bytes, "errors": done.report.errors}))
"""


@pytest.fixture(scope="module")
def half_billion(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Path:
    """A checkpoint of the 0.5B shape with random weights in bfloat16 and a tiny tokenizer."""
    folder = tmp_path_factory.mktemp("half-billion")
    for file in (golden / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    config = FastVLMConfig.from_preset("0.5b")
    config.image_token_id = image_token_id_of(folder)
    random_model(config, torch.bfloat16, torch.device("cpu")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["float32", "q4f16"])
def exported(request: pytest.FixtureRequest, half_billion: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What an export in a process of its own says of itself, with its precision and the checkpoint's bytes."""
    out = tmp_path_factory.mktemp("exported") / "out"
    command = [sys.executable, "-c", EXPORT, str(half_billion), str(out), request.param]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(out)
    weights = sum(file.stat().st_size for file in half_billion.glob("*.safetensors"))
    return json.loads(done.stdout.splitlines()[-1]) | {"precision": request.param, "weights": weights}


@pytest.mark.soak
def test_size_and_errors(exported: dict) -> None:
    if exported["precision"] == "q4f16":
        assert exported["bytes"] <= 850e6
    else:
        assert max(exported["errors"].values()) < 1e-4


@pytest.mark.soak
def test_memory(exported: dict) -> None:
    assert exported["peak"] <= 3 * exported["weights"], exported
