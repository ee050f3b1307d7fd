# SPDX-License-Identifier: Apache-2.0
"""Transformers' own exporters take the model as it is, encoder and generation."""

from typing import Any

import pytest
import torch

from helpers import random_pixels, relative_error
from transformers_fastvlm import FastVLMForConditionalGeneration

exporters = pytest.importorskip("transformers.exporters", reason="Transformers has exporters from 5.23 on")
pytest.importorskip("onnxscript", reason="ONNX graphs need the extra onnx")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

IDS = torch.tensor([[5, *[483] * 16, 6, 7, 8]])
BACKENDS = ["Dynamo", "Onnx"]


@pytest.fixture(scope="module")
def model(checkpoint) -> Any:
    return FastVLMForConditionalGeneration.from_pretrained(checkpoint("qwen2_tied")).eval()


def backend(name: str) -> tuple[Any, Any]:
    """Return an exporter and a configuration for it."""
    return getattr(exporters, f"{name}Exporter")(), getattr(exporters, f"{name}Config")()


@pytest.mark.parametrize("name", BACKENDS)
def test_encoder(name: str, model: Any) -> None:
    exporter, config = backend(name)
    pixels = random_pixels(1, 256, 256)
    exported = exporter.export(model.model.vision_tower, {"pixel_values": pixels}, config=config)
    with torch.no_grad():
        expected = model.model.vision_tower(pixels).last_hidden_state
    assert relative_error(exported(pixel_values=pixels).last_hidden_state, expected) < 1e-5


@pytest.mark.parametrize("name", BACKENDS)
def test_generation(name: str, model: Any) -> None:
    exporter, config = backend(name)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "pixel_values": random_pixels(1, 256, 256)}
    exported = exporter.export_for_generation(model, inputs, config)
    # Transformers encodes images before the step that it captures, so that the encoder is no part of its own.
    assert set(exported.components) == {"language_model", "lm_head", "decode"}
    hidden = torch.randn(1, IDS.shape[1], 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.lm_head(hidden)
    found = exported.runners["lm_head"](input=hidden)
    assert relative_error(next(iter(found.values())) if isinstance(found, dict) else found, expected) < 1e-5
