# SPDX-License-Identifier: Apache-2.0
"""Weights of 8 and 4 bits by bitsandbytes: the language model's alone, whatever the configuration leaves open."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from helpers import relative_error
from transformers_fastvlm import FastVLMForConditionalGeneration
from transformers_fastvlm.checkpoints import tiny_checkpoint

pytest.importorskip("bitsandbytes", reason="quantized weights need bitsandbytes")
pytest.importorskip("accelerate", reason="device_map needs accelerate")

IDS = torch.arange(3, 40)[None]
# Measured on the tiny checkpoints, whose weights are uniform noise: 0.036 and 0.46 with heads tied, 0.028 and 0.36 not.
BOUNDS = {"8bit": 0.06, "4bit": 0.6}
SETTINGS: list[Any] = [
    pytest.param("8bit", lambda: BitsAndBytesConfig(load_in_8bit=True), id="8bit"),
    pytest.param("4bit", lambda: BitsAndBytesConfig(load_in_4bit=True), id="4bit"),
    pytest.param("4bit", lambda: {"quant_method": "bitsandbytes", "load_in_4bit": True}, id="4bit-dict"),
]


@pytest.mark.usefixtures("bitsandbytes_without_packing")
@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
@pytest.mark.parametrize("name", ["qwen2_tied", "llama"])
def test_the_language_model_alone_is_quantized(
    name: str, kind: str, settings: Callable[[], Any], checkpoint: Callable[[str], Path]
) -> None:
    plain = FastVLMForConditionalGeneration.from_pretrained(checkpoint(name))
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint(name), quantization_config=settings(), dtype=torch.float32, device_map={"": "cpu"}
    )
    small = {key for key, parameter in model.named_parameters() if parameter.dtype in (torch.uint8, torch.int8)}
    assert len(small) == 21 and all(".language_model.layers." in key for key in small)
    for key, parameter in plain.named_parameters():
        if key not in small:
            assert model.get_parameter(key).equal(parameter), key
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name == "qwen2_tied")
    with torch.no_grad():
        error = relative_error(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert 0 < error < BOUNDS[kind]
    tokens = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert tokens.shape == (1, IDS.shape[1] + 4)


def test_four_bits_on_this_cpu() -> None:
    """The embedded model's widths are multiples of 64, so that every CPU takes its own way."""
    plain = FastVLMForConditionalGeneration.from_pretrained(tiny_checkpoint())
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForImageTextToText.from_pretrained(
        tiny_checkpoint(), quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    with torch.no_grad():
        error = relative_error(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert 0 < error < 0.2


def test_modules_that_a_user_names_are_left_out_instead(checkpoint: Callable[[str], Path]) -> None:
    config = BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=["model.vision_tower", "model.language_model", "lm_head"]
    )
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint("qwen2_untied"), quantization_config=config, device_map={"": "cpu"}
    )
    layers = {name for name, module in model.named_modules() if type(module).__name__ == "Linear8bitLt"}
    assert layers == {"model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"}
