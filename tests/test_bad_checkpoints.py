# SPDX-License-Identifier: Apache-2.0
"""Damaged and foreign checkpoints: each is a clear error, never a half-initialised model."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from test_registration_order import run
from transformers_fastvlm import FastVLMForConditionalGeneration, FastVLMProcessor


@pytest.fixture
def copy(checkpoint, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(checkpoint("qwen2_untied"), target)
    return target


def rewrite(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForImageTextToText.from_pretrained(copy)


@pytest.mark.parametrize("size", [0, 4, 1000, 100_000])
def test_truncated_weights(size: int, copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(OSError, match=f"{re.escape(str(copy))}.*truncated or damaged"):
        AutoModelForImageTextToText.from_pretrained(copy)


def test_missing_shard(copy: Path) -> None:
    model = FastVLMForConditionalGeneration.from_pretrained(copy)
    sharded = copy / "sharded"
    model.save_pretrained(sharded, max_shard_size="300KB")
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=re.escape(shard.name)):
        AutoModelForImageTextToText.from_pretrained(sharded)


def test_unknown_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    rewrite(copy, tensors | {"model.vision_resampler.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"does not know: model\.vision_resampler\.weight"):
        AutoModelForImageTextToText.from_pretrained(copy)


def test_missing_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.mm_projector.2.bias"]
    rewrite(copy, tensors)
    with pytest.raises(ValueError, match=r"no values for.*multi_modal_projector\.linear_2\.bias"):
        AutoModelForImageTextToText.from_pretrained(copy)


def test_wrong_shape(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.mm_projector.0.weight"] = torch.zeros(64, 128)
    rewrite(copy, tensors)
    with pytest.raises(ValueError, match=r"other shapes.*linear_1.weight"):
        AutoModelForImageTextToText.from_pretrained(copy)


def test_foreign_checkpoint(copy: Path) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text()) | {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    path.write_text(json.dumps(config))
    # AutoProcessor turns every error into "Unrecognized processing class", so ours is asked.
    for load in (AutoModelForImageTextToText.from_pretrained, FastVLMProcessor.from_pretrained):
        with pytest.raises(ValueError, match="clip-vit-large-patch14-336"):
            load(copy)


def test_config_that_is_not_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config\.json.*not a valid JSON"):
        AutoModelForImageTextToText.from_pretrained(copy)


def test_pickled_weights_are_not_executed(copy: Path, tmp_path: Path) -> None:
    """A checkpoint that has only a pickle with code in it is refused, and the code does not run."""
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload()}, copy / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights_only|unsupported|unsafe|safetensors"):
        AutoModelForImageTextToText.from_pretrained(copy)
    assert not marker.exists()


def test_no_network(tmp_path: Path) -> None:
    """A hub name that is neither cached nor reachable: the error says what to do."""
    code = """
        import transformers_fastvlm
        from transformers import AutoModelForImageTextToText, AutoProcessor
        for load in (AutoModelForImageTextToText.from_pretrained, AutoProcessor.from_pretrained):
            try:
                load("apple/FastVLM-0.5B")
            except OSError as error:
                print("OSError", "couldn't connect" in str(error))
    """
    assert run(code, HF_HOME=str(tmp_path)).splitlines() == ["OSError True"] * 2
