# SPDX-License-Identifier: Apache-2.0
"""LoRA on a fused encoder, by peft itself."""

import pytest
import torch

from helpers import random_pixels
from transformers_fastvlm import FastViTHDConfig, FastViTHDModel
from transformers_fastvlm.inference import fuse

peft = pytest.importorskip("peft", reason="needs peft")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_lora_is_refused() -> None:
    config = FastViTHDConfig(depths=[1, 1, 1, 1, 1], hidden_sizes=[8, 16, 32, 64, 128], image_size=128)
    lora = peft.LoraConfig(target_modules=["fc1", "qkv"], r=2)
    adapted = peft.get_peft_model(fuse(FastViTHDModel(config).eval()), lora)
    pixels = random_pixels(1, 64, 64)
    for model in (adapted.eval(), adapted.train()):
        with torch.set_grad_enabled(model.training), pytest.raises(RuntimeError, match="fused and cannot"):
            model(pixel_values=pixels)
    with pytest.raises(RuntimeError, match="fc1 carries an adapter"):
        fuse(peft.get_peft_model(FastViTHDModel(config), lora).eval())
