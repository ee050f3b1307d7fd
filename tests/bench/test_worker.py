# SPDX-License-Identifier: Apache-2.0
"""One case, measured in this process: every part is there, they add up, and inputs and weights are what they should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from transformers_fastvlm import FastVLMConfig
from transformers_fastvlm.bench import Options, subjects
from transformers_fastvlm.bench.random_weights import random_model

PARTS = {"preprocess", "encode", "project", "prefill"}
TIMES = PARTS | {"first_token_from_pixels", "first_token", "first_decode", "decode"}

Checkpoint = Callable[[str], Path]


def check(run: dict[str, Any], parts: set[str] = PARTS) -> None:
    for kind in ("seconds", "processor_seconds"):
        seconds = run[kind]
        assert set(seconds) - {"unsplit_from_pixels"} == (TIMES - PARTS) | parts
        assert sum(seconds[part] for part in parts) == pytest.approx(seconds["first_token"])
        assert seconds["first_token"] == pytest.approx(seconds["first_token_from_pixels"] + seconds["preprocess"])
    assert all(seconds > 0 for seconds in run["seconds"].values())


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_anyres", "llama"])
def test_every_part_of_a_checkpoint_is_measured(name: str, checkpoint: Checkpoint, measure: Any) -> None:
    options = Options(models=(str(checkpoint(name)),), sizes=(256,), batches=(2,), threads=1, new_tokens=4)
    facts, run, runner = measure(options, "fastvlm")
    check(run)
    assert "unsplit_from_pixels" in run["seconds"]
    assert "unsplit_from_pixels" not in runner.run()["seconds"]
    assert facts["weights"] == "checkpoint" and facts["class"] == "FastVLMForConditionalGeneration"
    assert facts["prompt_tokens"] == facts["image_tokens"] + options.prompt_tokens
    assert name == "qwen2_anyres" or (facts["image_tokens"] == 16 and facts["image_inputs"] == [2, 3, 256, 256])
    assert facts["load_seconds"] > 0 and facts["encoder_parameters"] < facts["parameters"]
    assert run["peak_bytes"] is None or run["peak_bytes"] >= run["imports_bytes"] > 0


def test_the_clocks_change_no_token(checkpoint: Checkpoint, measure: Any) -> None:
    options = Options(models=(str(checkpoint("qwen2_tied")),), sizes=(256,), threads=1, new_tokens=6)
    _, _, runner = measure(options, "fastvlm")
    plain: Any = AutoModelForImageTextToText.from_pretrained(checkpoint("qwen2_tied"), dtype="float32").eval()
    inputs = runner.subject.preprocess([runner.image_file])
    model = runner.subject.model
    runner.split.begin()
    ours = model.generate(**inputs, max_new_tokens=6, logits_processor=[runner.split])
    runner.split.end()
    assert set(runner.split.parts) == {"encode", "project"}
    expected = plain.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(ours, expected)


def test_a_fused_model(checkpoint: Checkpoint, measure: Any) -> None:
    options = Options(models=(str(checkpoint("qwen2_tied")),), sizes=(256,), threads=1, new_tokens=4, fuse=True)
    plain, _, _ = measure(options, "fastvlm")
    facts, run, runner = measure(options, "fastvlm", label="fused", fuse=True)
    check(run)
    # BatchNorms and layer scales are gone.
    assert runner.subject.model.model.vision_tower.fused and facts["parameters"] < plain["parameters"]


def test_any_model_with_a_processor(checkpoint: Checkpoint, measure: Any) -> None:
    directory = str(checkpoint("qwen2_tied"))
    options = Options(models=(directory,), against=(directory,), sizes=(512,), threads=1, new_tokens=4)
    facts, run, _ = measure(options, "other")
    check(run)
    # The processor's own size and a real question.
    assert facts["image_inputs"] == [1, 3, 256, 256] and facts["image_tokens"] == 16
    assert facts["prompt_tokens"] > facts["image_tokens"] + 10


def test_llava_onevision_takes_the_tokens_of_the_paper(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, value in small.items():
        monkeypatch.setitem(subjects._SIGLIP, name, value)
        monkeypatch.setitem(subjects._ONEVISION_TEXT, name, value)
    monkeypatch.setitem(subjects._ONEVISION_TEXT, "num_key_value_heads", 1)
    monkeypatch.setitem(subjects._ONEVISION_TEXT, "layer_types", ["full_attention"])
    options = Options(against=("llava-onevision-0.5b",), threads=1, new_tokens=4)
    facts, run, _ = measure(options, "llava-onevision")
    check(run)
    # Ten views of 27 x 27, as in the paper, and a newline after each of the 81 rows of the tiles.
    assert facts["image_tokens"] == 7290 + 81
    assert facts["image_inputs"] == [1, 10, 3, 384, 384] and facts["weights"] == "random"


def test_a_part_that_is_a_wrong_model_is_refused(checkpoint: Checkpoint, measure: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    options = Options(models=(str(tmp_path),), sizes=(256,), threads=1)
    with pytest.raises(ValueError, match="has model_type 'qwen2'; expected a FastVLM"):
        measure(options, "fastvlm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_of_a_size_that_activations_keep(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    config = FastVLMConfig.from_pretrained(checkpoint("qwen2_untied"))
    state = torch.random.get_rng_state()
    model: Any = random_model(config, dtype, torch.device("cpu"))
    again = random_model(config, dtype, torch.device("cpu"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.inference_mode():
        pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
        ids = torch.tensor([[1, *[config.image_token_id] * 16, 2]])
        logits = model(input_ids=ids, pixel_values=pixels).logits.float()
    assert 0.01 < logits.std() < 100
