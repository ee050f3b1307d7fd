# SPDX-License-Identifier: Apache-2.0
"""Weights of 8 and 4 bits by torchao: the language model's alone, by from_pretrained as of any model."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import relative_error
from transformers_fastvlm import compat
from transformers_fastvlm.kernels import quantized

torchao = pytest.importorskip("torchao", reason="weights of few bits need torchao")
pytest.importorskip("accelerate", reason="device_map needs accelerate")

from torchao.quantization import (  # noqa: E402
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
)
from transformers import AutoModelForImageTextToText, TorchAoConfig  # noqa: E402

IDS = torch.arange(3, 40)[None]
KINDS: dict[str, Callable[..., Any]] = {
    "int8": Int8WeightOnlyConfig,
    "int4": lambda **more: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), **more),
}
# Of symmetric integers: how many steps the largest value of a group has, and how many values share a scale (0: a row).
STEPS = {"int8": (127.5, 0), "int4": (7.5, 32)}


def load(directory: Path, kind: str | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    if kind is not None:
        options["quantization_config"] = TorchAoConfig(KINDS[kind](), **options.pop("settings", {}))
    return AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, **options)


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if hasattr(parameter, "qdata")}


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**(inputs or {"input_ids": IDS})).logits.float()
    return found


def with_image(model: Any) -> dict[str, torch.Tensor]:
    image_token = torch.full((1, 16), model.config.image_token_id)
    pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.cat((IDS[:, :9], image_token, IDS[:, 9:]), -1), "pixel_values": pixels}


def given_the_weights_of(model: nn.Module, plain: nn.Module, kind: str) -> None:
    """Write the values of quantized weights into a plain model; none may be further away than half a step."""
    steps, group = STEPS[kind]
    for key in quantized_names(model):
        found, weight = model.get_parameter(key).dequantize().detach(), plain.get_parameter(key).data
        rows, wanted = (matrix.unflatten(-1, (-1, group or matrix.shape[-1])) for matrix in (found, weight))
        step = wanted.abs().amax(-1, keepdim=True) / steps
        assert ((rows - wanted).abs() <= 0.51 * step).all(), key
        weight.copy_(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied", "llama"])
def test_the_language_model_alone_is_quantized(name: str, kind: str, checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint(name)
    plain, model = load(directory), load(directory, kind)
    layers = {f"{key}.weight" for key, module in plain.named_modules() if isinstance(module, nn.Linear)}
    layers = {key for key in layers if ".language_model.layers." in key}
    assert quantized_names(model) == layers and len(layers) == 21
    for key, parameter in plain.named_parameters():
        if key not in layers:
            assert model.get_parameter(key).equal(parameter), key
    head, embeddings = model.lm_head.weight, model.get_input_embeddings().weight
    assert (head is embeddings) == (name == "qwen2_tied") == model.config.tie_word_embeddings
    inputs = with_image(plain)
    found = logits(model, **inputs)
    assert relative_error(found, logits(plain, **inputs)) > 1e-3
    given_the_weights_of(model, plain, kind)
    assert relative_error(found, logits(plain, **inputs)) < 1e-5
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert model.generate(**inputs, **options).tolist() == plain.generate(**inputs, **options).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The saved directory holds the small weights and says so itself."""
    model = load(checkpoint("qwen2_tied"), kind, torch.bfloat16)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert quantized_names(again) == quantized_names(model) and again.dtype == torch.bfloat16
    assert logits(again).equal(expected)
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_modules_that_a_user_names_are_left_out_instead(checkpoint: Callable[[str], Path]) -> None:
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["model.language_model", "lm_head"])
    model = AutoModelForImageTextToText.from_pretrained(checkpoint("qwen2_untied"), quantization_config=config)
    parts = {name.split(".")[1] for name in quantized_names(model)}
    assert parts == {"vision_tower", "multi_modal_projector"}
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForImageTextToText.from_pretrained(checkpoint("qwen2_untied"), quantization_config=config)
    assert config.modules_to_not_convert is None  # the user's own object is not changed


def test_the_head_too(checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint("qwen2_untied")
    kept = ["model.vision_tower", "model.multi_modal_projector"]
    model = load(directory, "int8", settings={"modules_to_not_convert": kept})
    assert "lm_head.weight" in quantized_names(model) and len(quantized_names(model)) == 22
    plain = load(directory)
    given_the_weights_of(model, plain, "int8")
    assert relative_error(logits(model), logits(plain)) < 1e-5


# torchao's 8-bit weights are always symmetric.
@pytest.mark.parametrize(("kind", "symmetric"), [("int8", True), ("int4", True), ("int4", False)])
def test_fast_products_are_torchaos(kind: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one row, some and many; against float32 they are no worse than torchao's own, up to rounding to bfloat16."""
    monkeypatch.setattr(quantized, "has_fast_gemm", lambda _: False)  # many rows in float32 on any processor
    monkeypatch.setattr(sys.modules["transformers_fastvlm.kernels.linear"], "_BLOCK", 128 * 40)  # and in three blocks
    more = {} if symmetric else {"mapping_type": MappingType.ASYMMETRIC}
    layers = nn.Sequential(nn.Linear(128, 96)).to(torch.bfloat16)
    torchao.quantization.quantize_(layers, KINDS[kind](**more))
    (layer,) = layers
    exact = layer.weight.dequantize().float().detach(), layer.bias.float().detach()
    for rows in (0, 1, 5, 40):
        x = torch.randn(2, rows, 128, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
        layer.__class__ = nn.Linear
        with torch.no_grad():
            plain = layer(x).float()
            quantized.speed_up_quantized_layers(layers)
            assert type(layer) is quantized.QuantizedLinear
            fast = layer(x).float()
        expected = nn.functional.linear(x.float(), *exact)
        assert fast.shape == plain.shape == expected.shape
        if rows == 0:
            continue
        error, plain_error = relative_error(fast, expected), relative_error(plain, expected)
        assert error < max(2 * plain_error, 0.004), (rows, error, plain_error)


def test_only_what_the_fast_products_can_do_is_given_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(config: Any, dtype: torch.dtype = torch.bfloat16, outputs: int = 96) -> nn.Linear:
        layers = nn.Sequential(nn.Linear(128, outputs)).to(dtype)
        torchao.quantization.quantize_(layers, config)
        quantized.speed_up_quantized_layers(layers)
        return layers[0]  # type: ignore[return-value]

    assert type(layer(Int8DynamicActivationInt8WeightConfig())) is nn.Linear
    assert type(layer(KINDS["int4"](), outputs=48)) is nn.Linear
    assert type(layer(IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerGroup(32)))) is nn.Linear
    full = layer(Int8WeightOnlyConfig(), torch.float32)
    monkeypatch.setattr(quantized.QuantizedLinear, "_gemm", lambda *_: pytest.fail("computed in bfloat16"))
    with torch.no_grad():
        assert full(torch.ones(1, 128)).dtype == torch.float32
    half = layer(Int8WeightOnlyConfig())
    x = torch.ones(1, 128, dtype=torch.bfloat16, requires_grad=True)
    half(x).sum().backward()  # gradients of inputs are torchao's
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_written_over(kind: str) -> None:
    """load_state_dict writes into the tensors that are there; what was packed of the old values is not used."""

    def layer(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(128, 96)).to(torch.bfloat16)
        torchao.quantization.quantize_(layers, KINDS[kind]())
        quantized.speed_up_quantized_layers(layers)
        assert type(layers[0]) is quantized.QuantizedLinear
        return layers

    x = torch.randn(1, 128).to(torch.bfloat16)
    first, second = layer(0), layer(1)
    with torch.no_grad():
        old, new = first(x), second(x)
        first.load_state_dict(second.state_dict())
        assert first(x).equal(new) and not new.equal(old)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_in_bfloat16(kind: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """from_pretrained makes the fast layers, and a step with a cache computes what the whole row does."""
    directory = checkpoint("qwen2_untied")
    model = load(directory, kind, torch.bfloat16)
    fast = [module for module in model.modules() if type(module) is quantized.QuantizedLinear]
    assert len(fast) == 21

    def last() -> torch.Tensor:
        with torch.no_grad():
            start = model(input_ids=IDS[:, :-1], use_cache=True)
            return model(input_ids=IDS[:, -1:], cache=start[compat.CACHE]).logits[:, -1].float()

    decoded = last()
    # Rounding to bfloat16, of the scales too: 0.02 and 0.07 were measured.
    assert relative_error(decoded, logits(load(directory, kind))[:, -1]) < 0.1
    monkeypatch.setattr(quantized, "_applies", lambda *_: False)
    assert 0 < relative_error(decoded, last()) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_an_accelerator(kind: str, checkpoint: Callable[[str], Path]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torchao is tried on CUDA")
    directory = checkpoint("qwen2_tied")
    model = load(directory, kind, torch.bfloat16, device_map="cuda")
    assert len(quantized_names(model)) == 21
    found = logits(model, input_ids=IDS.cuda()).cpu()
    assert relative_error(found, logits(load(directory, kind))) < 0.1  # rounding to bfloat16, as above
