# SPDX-License-Identifier: Apache-2.0
"""Tests that need an accelerator; `make test-gpu` runs them on CUDA or MPS."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers import golden_images, random_pixels, relative_error
from transformers_fastvlm import FastViTHDConfig, FastViTHDModel

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    pytest.fail("make test-gpu needs CUDA or MPS, and torch sees neither")


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)], ids=str
)
@torch.no_grad()
def test_full_size_encoder(dtype: torch.dtype, limit: float, device: str) -> None:
    torch.manual_seed(0)
    model = FastViTHDModel(FastViTHDConfig(layer_scale_init_value=0.01)).eval()
    pixels = random_pixels(1, 512, 512)
    expected = model(pixels).last_hidden_state
    outputs = model.to(device, dtype)(pixels.to(device))
    assert outputs.last_hidden_state.dtype == dtype
    assert relative_error(outputs.last_hidden_state.cpu(), expected) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen2_untied", "llama", "qwen2_anyres"])
def test_generate(name: str, dtype: torch.dtype, device: str, checkpoint, golden: Path) -> None:
    directory = checkpoint(name)
    processor = AutoProcessor.from_pretrained(directory)
    images = golden_images(golden, ["wide_rgb.png", "tall_rgb.jpg"])
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "Compare them."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype)
    fixed = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    ways: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"cache_implementation": "static"}]
    with torch.no_grad():
        expected = model.float()(**inputs).logits
        answers = [model.generate(**inputs, **fixed, **options) for options in ways]
        model = model.to(device, dtype)
        logits = model(**inputs.to(device)).logits.float().cpu()
    assert relative_error(logits, expected) < (1e-3 if dtype == torch.float32 else 5e-2)
    for options, tokens in zip(ways, answers, strict=True):
        found = model.generate(**inputs, **fixed, **options)
        if dtype == torch.float32:
            assert found.tolist() == tokens.tolist(), options
        elif "num_beams" not in options:  # rounding may decide between two tokens, but only where they are level
            with torch.no_grad():
                scores = model(**inputs | {"input_ids": found, "attention_mask": torch.ones_like(found)}).logits.float()
            scores, chosen = scores[0, -5:-1], found[0, -4:, None]
            assert ((scores.amax(-1, keepdim=True) - scores.gather(-1, chosen)) < 0.05 * scores.std()).all(), options


class _NoFloat64(TorchDispatchMode):
    """Apple's GPUs have no float64, so creating a float64 tensor off the CPU fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64 and made.device.type != "cpu":
            pytest.fail(f"{func} made a float64 tensor on {made.device}")
        return made


@torch.no_grad()
def test_merging_needs_no_float64(device: str) -> None:
    torch.manual_seed(0)
    config = FastViTHDConfig(
        depths=[1, 1, 2, 1, 1], hidden_sizes=[32, 64, 128, 256, 512], layer_scale_init_value=0.1, reparameterized=False
    )
    model = FastViTHDModel(config).eval().to(device)
    pixels = random_pixels(1, 256, 256).to(device)
    expected = model(pixels).last_hidden_state
    with _NoFloat64():
        model.reparameterize()
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert relative_error(model(pixels).last_hidden_state, expected) < 1e-3


def test_ids_without_embeddings(device: str, checkpoint) -> None:
    """The error is ours, not a device-side assertion, which would make the device unusable."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint("qwen2_untied")).to(device)
    for wrong in (-200, 600):
        with pytest.raises(ValueError, match=str(wrong)):
            model.generate(torch.tensor([[5, wrong, 6]], device=device), max_new_tokens=2)
    ids = torch.tensor([[5, 6]], device=device)
    assert model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (1, 4)


@torch.no_grad()
def test_compiled_encoder(device: str) -> None:
    if device != "cuda":
        pytest.skip("Inductor's code for MPS is not what this checks")
    torch.manual_seed(0)
    config = FastViTHDConfig(depths=[1, 1, 2, 1, 1], hidden_sizes=[32, 64, 128, 256, 512], layer_scale_init_value=0.1)
    model = FastViTHDModel(config).eval().to(device)
    pixels = random_pixels(2, 256, 256).to(device)
    expected = model(pixels).last_hidden_state
    compiled = torch.compile(model, fullgraph=True)
    assert relative_error(compiled(pixels).last_hidden_state, expected) < 1e-3


@torch.no_grad()
def test_flash_attention(device: str) -> None:
    pytest.importorskip("flash_attn", reason="needs the flash-attn package")
    torch.manual_seed(0)
    config = FastViTHDConfig(depths=[1, 1, 1, 2, 2], hidden_sizes=[32, 64, 128, 256, 512], layer_scale_init_value=0.1)
    model = FastViTHDModel(config).eval().to(device, torch.bfloat16)
    pixels = random_pixels(1, 256, 256).to(device)
    expected = model(pixels).last_hidden_state
    model.set_attn_implementation("flash_attention_2")
    assert relative_error(model(pixels).last_hidden_state, expected) < 5e-2


def test_training_step(device: str, checkpoint) -> None:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint("qwen2_untied")).to(device).train()
    ids = torch.tensor([[5] + [483] * 16 + [6, 7]], device=device)
    model(input_ids=ids, labels=ids, pixel_values=random_pixels(1, 256, 256).to(device)).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
