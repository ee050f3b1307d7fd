# SPDX-License-Identifier: Apache-2.0
"""The extra quantization: the tiny model answers with torchao's and with bitsandbytes' 8-bit integers."""

import torch
from PIL import Image
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TorchAoConfig
from using import ANSWER, IMAGE, QUESTION

from transformers_fastvlm.checkpoints import tiny_checkpoint

processor = AutoProcessor.from_pretrained(tiny_checkpoint())
content = [{"type": "image", "image": Image.open(IMAGE).convert("RGB")}, {"type": "text", "text": QUESTION}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(dtype=torch.bfloat16)
for config in (TorchAoConfig(Int8WeightOnlyConfig()), BitsAndBytesConfig(load_in_8bit=True)):
    model = AutoModelForImageTextToText.from_pretrained(
        tiny_checkpoint(), dtype=torch.bfloat16, quantization_config=config
    )
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert ANSWER in answer, (type(config), answer)
