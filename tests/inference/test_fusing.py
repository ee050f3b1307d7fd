# SPDX-License-Identifier: Apache-2.0
"""fuse(): the same answers from fewer operations, and a clear refusal of everything that needs the own parameters."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers import expand, golden_images, random_pixels, relative_error
from transformers_fastvlm import (
    FastViTHDBackbone,
    FastViTHDConfig,
    FastViTHDModel,
    FastVLMForConditionalGeneration,
    FastVLMImageProcessorPil,
    FastVLMModel,
)
from transformers_fastvlm.inference import fuse
from transformers_fastvlm.modeling_fastvithd import AttentionBlock, RepMixerBlock

TINY = {"depths": [1, 1, 2, 1, 1], "hidden_sizes": [8, 16, 32, 64, 128], "image_size": 128}
HALF = (torch.bfloat16, torch.float16)


def encoder(dtype: torch.dtype = torch.float32, seed: int = 0, kind: Any = FastViTHDModel, **fields: Any) -> Any:
    """An encoder whose BatchNorms and layer scales are all far from the identity."""
    torch.manual_seed(seed)
    model = kind(FastViTHDConfig(**(TINY | fields)))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "layer_scale" in name or "running_var" in name or ".bn.weight" in name:
                tensor.uniform_(0.2, 0.8)
            elif "running_mean" in name or name.endswith("bias"):
                tensor.normal_(std=0.2)
    return model.to(dtype).eval()


def plain_call(model: nn.Module, pixels: torch.Tensor) -> Any:
    """Run with gradients enabled, for which the operations for inference step aside."""
    return model(pixels).last_hidden_state.detach()


def unfused_parts(model: nn.Module) -> int:
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return norms + sum("layer_scale" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("fields", [{}, {"multi_scale": "conv"}, {"projection_dim": 0}], ids=str)
@pytest.mark.parametrize("reparameterized", [True, False], ids=["merged", "train_time_form"])
def test_fused_encoder_computes_the_same(reparameterized: bool, fields: dict[str, Any]) -> None:
    model = encoder(reparameterized=reparameterized, **fields)
    pixels = random_pixels(2, 128, 192)
    expected = model(pixels, output_hidden_states=True)
    assert unfused_parts(model) > 0
    assert fuse(model) is model and unfused_parts(model) == 0
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = model(pixels, output_hidden_states=True)
        for ours, reference in zip(got.to_tuple()[:2], expected.to_tuple()[:2], strict=True):
            assert relative_error(ours.detach(), reference.detach()) < 1e-5
        for ours, reference in zip(got.hidden_states, expected.hidden_states, strict=True):
            assert ours.shape == reference.shape and relative_error(ours.detach(), reference.detach()) < 1e-5


@torch.no_grad()
def test_attention_maps() -> None:
    model = encoder(attn_implementation="eager")
    pixels = random_pixels(1, 128, 128)
    expected = model(pixels, output_attentions=True).attentions
    got = fuse(model)(pixels, output_attentions=True).attentions
    assert [x.shape for x in got] == [(1, 2, 16, 16), (1, 4, 4, 4)]
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(got, expected, strict=True))


@torch.no_grad()
def test_backbone() -> None:
    model = encoder(kind=FastViTHDBackbone, out_features=["stage2", "stage5"])
    pixels = random_pixels(1, 128, 64)
    expected = model(pixels).feature_maps
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(fuse(model)(pixels).feature_maps, expected, strict=True))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_types(dtype: torch.dtype) -> None:
    """No farther from float32 than the encoder as loaded, on average over encoders: roundings are chance."""
    ratios = []
    for seed in range(8):
        model = encoder(dtype, seed)
        pixels = random_pixels(2, 128, 64, seed)
        exact = plain_call(copy.deepcopy(model).float(), pixels)
        plain = plain_call(model, pixels)
        fuse(model)
        assert {p.dtype for p in model.parameters()} == {dtype}
        # The last stage of a float16 encoder: one BatchNorm and two layer scales.
        assert unfused_parts(model) == (3 if dtype == torch.float16 else 0)
        with torch.no_grad():
            fast = model(pixels).last_hidden_state
        assert fast.dtype == dtype
        reference = relative_error(plain, exact)
        ratios.append([relative_error(x, exact) / reference for x in (fast, plain_call(model, pixels))])
    # Folded weights are rounded once more. Without the fast forms that shows on CPUs that multiply in bfloat16: 1.07
    # over 16 encoders, measured with AMX; elsewhere both forms compute in float32.
    assert (torch.tensor(ratios).mean(0) <= torch.tensor([1.05, 1.15])).all(), ratios


@torch.no_grad()
def test_scales_too_small_for_float16_stay() -> None:
    """1e-5 times a weight of 0.02 is no number of float16, but one of bfloat16."""
    for dtype, left in ((torch.float16, 9), (torch.bfloat16, 0), (torch.float32, 0)):
        model, pixels = encoder(dtype), random_pixels(1, 64, 64)
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(1e-5)
        expected = model(pixels).last_hidden_state
        assert unfused_parts(fuse(model)) == left
        assert relative_error(model(pixels).last_hidden_state, expected) < 2 * torch.finfo(dtype).eps + 1e-5


def test_folding_is_rounded_once() -> None:
    model = encoder(torch.bfloat16)
    block, attention = model.network[0][0], model.network[7][0]
    assert isinstance(block, RepMixerBlock) and isinstance(attention, AttentionBlock)
    weight = block.convffn.fc2.weight.double() * block.layer_scale.double()[..., None]
    matrix = attention.token_mixer.proj.weight.double() * attention.layer_scale_1.double().flatten()[:, None]
    kernel, bias = block.convffn.conv.merged()
    fuse(model)
    assert torch.equal(block.convffn.fc2.weight, weight.bfloat16())
    assert torch.equal(attention.token_mixer.proj.weight, matrix.bfloat16())
    assert torch.equal(block.convffn.conv.weight, kernel.bfloat16())
    assert torch.equal(block.convffn.conv.bias, bias.bfloat16())


def test_fusing_again_changes_nothing() -> None:
    model = fuse(encoder())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert fuse(model) is model
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("reparameterized", [True, False], ids=["merged", "train_time_form"])
@torch.no_grad()
def test_reloading_reverses(reparameterized: bool, tmp_path: Path) -> None:
    model = encoder(reparameterized=reparameterized)
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fuse(model)
    again = FastViTHDModel.from_pretrained(tmp_path)
    assert not again.fused and again.config.reparameterized == reparameterized
    assert again.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_anyres"])
@torch.no_grad()
def test_whole_model_answers_as_the_reference(name: str, checkpoint: Callable[[str], Path], golden: Path) -> None:
    directory = checkpoint(name)
    answers = load_file(golden / name / "expected.safetensors")
    cases = json.loads((golden / name / "expected.json").read_text())
    model = fuse(FastVLMForConditionalGeneration.from_pretrained(directory))
    assert unfused_parts(model) == 0
    processor = FastVLMImageProcessorPil.from_pretrained(directory)
    compared = 0
    for case in ("single0", "single1"):
        images = dict(processor(golden_images(golden, [cases[case]["image"]]), return_tensors="pt"))
        lengths = [len(features) for features in model.get_image_features(**images).pooler_output]
        ids = torch.tensor([expand(cases[case]["input_ids"], lengths, model.config.image_token_id)])
        logits = model(input_ids=ids, **images).logits
        assert relative_error(logits[0, -1], answers[f"{case}.logits_last"]) < 1e-5
        if f"{case}.greedy" in answers:
            greedy = answers[f"{case}.greedy"].tolist()
            options = {"max_new_tokens": len(greedy), "do_sample": False, "eos_token_id": None}
            out = model.generate(input_ids=ids, **images, **options)
            assert out[0, ids.shape[1] :].tolist() == greedy
            compared += 1
    assert compared


@torch.no_grad()
def test_train_time_form_answers_as_the_reference(golden: Path, golden_fill: Any, tmp_path: Path) -> None:
    import build

    prefix = "model.vision_tower.vision_tower.model."
    tensors = load_file(build.build("train_form", tmp_path / "form") / "model.safetensors")
    config = FastViTHDConfig(**(TINY | {"image_size": 256, "projection_dim": 0, "reparameterized": False}))
    model = FastViTHDModel(config).eval()
    model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    values = golden_fill._uniform("train_form.pixel_values", 2 * 3 * 128 * 192, 0)
    pixels = torch.tensor(values, dtype=torch.float32).view(2, 3, 128, 192)
    expected = load_file(golden / "train_form.safetensors")["features"]
    assert relative_error(fuse(model)(pixels).last_hidden_state, expected) < 1e-5


def test_training_is_refused() -> None:
    model, pixels = fuse(encoder()), random_pixels(1, 64, 64)
    with pytest.raises(RuntimeError, match=r"fused.*take no gradients.*from_pretrained"):
        model(pixels).last_hidden_state.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()
    with pytest.raises(RuntimeError, match=r"fused and cannot be trained.*from_pretrained"):
        model(pixels)
    with torch.no_grad():
        model(pixels)


def test_saving_and_loading_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    whole = FastVLMModel.from_pretrained(checkpoint("qwen2_tied"))
    tensors = whole.vision_tower.state_dict()
    fuse(whole.vision_tower)
    for model in (whole, whole.vision_tower, copy.deepcopy(whole)):
        with pytest.raises(RuntimeError, match=r"fused and cannot be saved.*from_pretrained"):
            model.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(RuntimeError, match="fused and cannot load"):
        whole.vision_tower.load_state_dict(tensors)


class _Adapted(nn.Module):
    """A layer in an adapter's wrapper, as peft makes them."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.base_layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base_layer(hidden)


def test_adapters_are_refused() -> None:
    model, pixels = fuse(encoder()), random_pixels(1, 64, 64)
    ffn = model.network[0][0].convffn
    ffn.fc1 = _Adapted(ffn.fc1)
    with pytest.raises(RuntimeError, match="fused and cannot carry an adapter"), torch.no_grad():
        model(pixels)
    model = encoder()
    ffn = model.network[0][0].convffn
    ffn.fc1 = _Adapted(ffn.fc1).eval()
    with pytest.raises(RuntimeError, match="fc1 carries an adapter"):
        fuse(model)


def test_what_cannot_be_fused_is_refused_untouched() -> None:
    with pytest.raises(TypeError, match="got a Linear"):
        fuse(nn.Linear(2, 2))
    model = encoder()
    with pytest.raises(RuntimeError, match=r"eval\(\)"):
        fuse(model.train())
    with torch.device("meta"), pytest.raises(ValueError, match=r"meta.*device that holds values"):
        fuse(FastViTHDModel(FastViTHDConfig(**TINY)).eval())
    model.eval().network[0].to("meta")
    with pytest.raises(ValueError, match="cpu and meta"):
        fuse(model)
    quantized = encoder()
    layer = quantized.network[7][0].token_mixer.qkv
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"qkv.weight is a Parameter of torch.int8"):
        fuse(nn.ModuleList([encoder(), quantized]))
    assert unfused_parts(quantized) > 0 and not quantized.fused


@torch.no_grad()
def test_fused_encoder_can_be_compiled_and_exported() -> None:
    model, pixels = fuse(encoder(depths=[1, 1, 1, 1, 1])), random_pixels(1, 64, 64)
    expected = model(pixels).last_hidden_state
    program = torch.export.export(model, (pixels,))
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for outputs in (program.module()(pixels), compiled(pixels)):
        assert relative_error(outputs.last_hidden_state, expected) < 1e-5
