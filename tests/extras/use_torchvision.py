# SPDX-License-Identifier: Apache-2.0
"""The extra torchvision: images are prepared by it."""

import torch
from PIL import Image
from using import IMAGE

from transformers_fastvlm import FastVLMImageProcessor
from transformers_fastvlm.checkpoints import tiny_checkpoint

processor = FastVLMImageProcessor.from_pretrained(tiny_checkpoint())
pixels = processor(Image.open(IMAGE).convert("RGB"), return_tensors="pt")["pixel_values"]
assert torch.isfinite(pixels).all() and pixels.shape[1] == 3
