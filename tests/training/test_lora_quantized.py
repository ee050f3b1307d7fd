# SPDX-License-Identifier: Apache-2.0
"""QLoRA: the language model alone is quantized, adapters learn on it, and are merged into the full weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import relative_error
from transformers_fastvlm import FastVLMForConditionalGeneration
from transformers_fastvlm.training import Recipe, add_lora, merge, quantization_config, run

pytest.importorskip("peft", reason="adapters need peft")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantized weights need bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = torch.arange(3, 40)[None]


def quantized(directory: Path, kind: str, device: str = "cpu") -> Any:
    config = quantization_config(kind, compute_dtype=torch.float32)
    return FastVLMForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, quantization_config=config, device_map={"": device}
    )


@pytest.mark.usefixtures("bitsandbytes_without_packing")
@pytest.mark.parametrize(("kind", "layer"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_the_language_model_alone_is_quantized(kind: str, layer: str, checkpoint: Callable[[str], Path]) -> None:
    model = quantized(checkpoint("qwen2_tied"), kind)
    found = {name for name, module in model.named_modules() if type(module).__name__ == layer}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert found == {name for name in linear if ".layers." in name} and len(found) == 21
    assert {model.get_parameter(f"{name}.weight").dtype for name in linear - found} == {torch.float32}
    plain = FastVLMForConditionalGeneration.from_pretrained(checkpoint("qwen2_tied"))
    with torch.no_grad():
        assert 0 < relative_error(model(input_ids=IDS).logits, plain(input_ids=IDS).logits) < 0.5


def test_only_adapters_learn_and_merging_wants_the_full_weights(checkpoint: Callable[[str], Path]) -> None:
    model = add_lora(quantized(checkpoint("qwen2_tied"), "4bit"), r=4)
    model(input_ids=IDS, labels=IDS).loss.backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in model.named_parameters() if ".lora_" in name} and len(learned) == 42
    with pytest.raises(ValueError, match=r"is quantized .torch.uint8.; adapters can only be merged"):
        merge(model)


def test_a_run(recipe: Callable[..., Recipe], checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Trained on four bits; the result is the base in full, with the adapters in it."""
    made = recipe(
        model={"image_size": 64, "dtype": "bfloat16"},
        train={"parts": [], "precision": "auto", "gradient_checkpointing": True},
        lora={"r": 4, "quantization": "4bit"},
        export={"dtype": "float32"},
        arguments={"max_steps": 2},
    )
    run(made)
    out, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", checkpoint("qwen2_tied")))
    assert set(out) == set(base) - {"lm_head.weight"}  # the head is tied
    moved = {name for name in out if not out[name].equal(base[name].bfloat16().float())}
    assert moved == {name for name in base if ".layers." in name and name.endswith("_proj.weight")}
    assert max(relative_error(out[name], base[name]) for name in moved) < 0.1
    FastVLMForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="quantization is '3bit'; expected '4bit' or '8bit'"):
        quantization_config("3bit")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_on_an_accelerator(kind: str, checkpoint: Callable[[str], Path]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("bitsandbytes is tried on CUDA")
    model = add_lora(quantized(checkpoint("qwen2_tied"), kind, "cuda:0"), r=4)
    ids = IDS.cuda()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
