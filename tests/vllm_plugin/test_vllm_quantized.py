# SPDX-License-Identifier: Apache-2.0
"""vLLM on a language model of 8 bits in the form of compressed-tensors, which the CPU build computes with."""

import gc
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

import torch
from safetensors.torch import load_file, save_file
from vllm_running import ENVIRONMENT, MAX_NEW_TOKENS, exact, scene_questions

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.engines import Sampling, load_engine

# vLLM's own imports and processes warn.
pytestmark = pytest.mark.filterwarnings("ignore")

EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
}


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """The tiny model, with the matrices of its language model in integers and a scale for each row."""
    folder = tmp_path / "quantized"
    shutil.copytree(tiny_checkpoint(), folder)
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = weight
        if name.startswith("model.layers.") and name.endswith("proj.weight"):
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            stored[name] = (weight.float() / scale).round().to(torch.int8)
            stored[f"{name}_scale"] = scale.to(torch.bfloat16)
    assert sum(weight.dtype == torch.int8 for weight in stored.values()) == 6 * 7
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return folder


def test_answers_are_right(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    conversations, right = scene_questions(30)
    engine = load_engine("vllm", str(quantized), dtype="bfloat16", max_images=1, max_model_len=512, cache_gib=0.25)
    try:
        answers = engine.generate(conversations, Sampling(max_new_tokens=MAX_NEW_TOKENS))
    finally:
        engine.close()
        gc.collect()  # vLLM leaves a socket's context to the collector, with a warning that is ignored here only
    assert exact([answer.text for answer in answers], right) >= 90
