# SPDX-License-Identifier: Apache-2.0
"""The encoder against the reference's outputs: full size, train-time form, and the interface of a backbone."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoBackbone, AutoConfig, AutoModel

from helpers import random_pixels, relative_error
from transformers_fastvlm import FastViTHDBackbone, FastViTHDConfig, FastViTHDModel

APPLE_PREFIX = "model.vision_tower.vision_tower.model."
TINY = {"depths": [1, 1, 2, 1, 1], "hidden_sizes": [8, 16, 32, 64, 128], "image_size": 256}


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(APPLE_PREFIX): tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def train_form(golden: Path, golden_fill, tmp_path_factory: pytest.TempPathFactory):
    """A function that returns the golden train-time encoder, its golden input and the golden outputs."""
    import build

    tensors = without_prefix(
        load_file(build.build("train_form", tmp_path_factory.mktemp("form")) / "model.safetensors")
    )
    shape = (2, 3, 128, 192)
    values = golden_fill._uniform("train_form.pixel_values", 2 * 3 * 128 * 192, 0)
    pixels = torch.tensor(values, dtype=torch.float32).view(shape)

    def make(**fields: object) -> FastViTHDModel:
        config = FastViTHDConfig(**(TINY | {"projection_dim": 0, "reparameterized": False} | fields))
        model = FastViTHDModel(config)
        model.load_state_dict(tensors)
        return model.eval()

    return make, pixels, load_file(golden / "train_form.safetensors")


def tiny(**fields: object) -> FastViTHDModel:
    """A tiny encoder with reproducible weights whose layer scales are not small enough to hide its branches."""
    torch.manual_seed(0)
    return FastViTHDModel(FastViTHDConfig(**(TINY | {"layer_scale_init_value": 0.3} | fields))).eval()


@pytest.fixture(scope="module")
def full_size(golden_fill, tmp_path_factory: pytest.TempPathFactory):
    import build

    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)

    path = build.build("full", tmp_path_factory.mktemp("full")) / "model.safetensors"
    model = FastViTHDModel(FastViTHDConfig()).eval()
    model.load_state_dict(without_prefix(load_file(path)))
    path.unlink()
    yield model
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size", ["256x256", "320x448", "512x512", "1024x1024"])
@torch.no_grad()
def test_full_size_encoder_equals_the_reference(size: str, full_size, golden: Path, golden_fill) -> None:
    height, width = map(int, size.split("x"))
    values = golden_fill._uniform(f"pixel_values.{size}", 3 * height * width, 0)
    outputs = full_size(torch.tensor(values, dtype=torch.float32).view(1, 3, height, width))
    expected = load_file(golden / "vision_full.safetensors")
    features = outputs.last_hidden_state
    assert features.shape == (1, 3072, height // 64, width // 64)
    if f"{size}.features" in expected:
        assert relative_error(features, expected[f"{size}.features"]) < 1e-5
    else:
        assert relative_error(features.flatten()[::97], expected[f"{size}.features_every_97"]) < 1e-5
    assert relative_error(outputs.pooler_output, expected[f"{size}.projection"]) < 1e-5


def test_train_form_equals_the_reference(train_form) -> None:
    make, pixels, expected = train_form
    model = make()
    with torch.no_grad():
        assert relative_error(model(pixels).last_hidden_state, expected["features"]) < 1e-5


def test_train_form_in_training_equals_the_reference(train_form, golden: Path) -> None:
    make, pixels, expected = train_form
    model = make().train()
    features = model(pixels).last_hidden_state
    assert relative_error(features.detach(), expected["features_training"]) < 1e-5
    running_mean = model.patch_embed[0].rbr_conv[0].bn.running_mean
    assert relative_error(running_mean, expected["stem_running_mean"]) < 1e-6
    features.square().mean().backward()
    norms = json.loads((golden / "train_form_gradients.json").read_text())
    ours = {APPLE_PREFIX + name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert ours.keys() == norms.keys()
    # BatchNorm almost cancels the gradients before it, so tiny norms are compared on the scale of the large ones.
    scale = max(norms.values())
    for name, norm in norms.items():
        assert ours[name] == pytest.approx(norm, rel=1e-4, abs=1e-6 * scale), name


def test_reparameterize_changes_form_and_not_function(train_form, tmp_path: Path) -> None:
    make, pixels, expected = train_form
    model = make()
    branches = len(model.state_dict())
    assert model.reparameterize() is model
    assert model.config.reparameterized is True
    names = model.state_dict().keys()
    assert len(names) < branches
    assert not any(
        part in name for name in names for part in ("rbr_", "lkb_origin", "small_conv", ".pe.", "mixer.mixer")
    )
    with torch.no_grad():
        assert relative_error(model(pixels).last_hidden_state, expected["features"]) < 1e-5
    model.save_pretrained(tmp_path)
    again = FastViTHDModel.from_pretrained(tmp_path)
    assert again.config.reparameterized is True
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    assert model.reparameterize() is model  # and a merged model does not change


def test_merged_names_are_those_of_the_published_form(train_form, golden: Path) -> None:
    make, _, _ = train_form
    merged = make().reparameterize().state_dict()
    published = json.loads((golden / "qwen2_tied" / "weights.json").read_text())
    expected = {
        name.removeprefix(APPLE_PREFIX): tuple(spec["shape"])
        for name, spec in published.items()
        if name.startswith(APPLE_PREFIX) and "head.proj" not in name
    }
    assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == expected


def test_reparameterize_in_training_is_refused(train_form) -> None:
    make, _, _ = train_form
    with pytest.raises(RuntimeError, match="eval\\(\\)"):
        make().train().reparameterize()


def test_reparameterize_keeps_dtype_and_frozen_parameters(train_form) -> None:
    make, _, _ = train_form
    model = make().to(torch.bfloat16).requires_grad_(False).reparameterize()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_batch_norm_is_frozen_in_the_merged_form_only(train_form) -> None:
    make, pixels, _ = train_form
    merged = make().reparameterize().train()
    before = {name: b.clone() for name, b in merged.named_buffers()}
    with torch.no_grad():
        trained = merged(pixels).last_hidden_state
        assert relative_error(trained, merged.eval()(pixels).last_hidden_state) < 1e-6
    assert all(torch.equal(before[name], b) for name, b in merged.named_buffers())
    frozen = make(freeze_batch_norm=True).train()
    assert not frozen.patch_embed[0].rbr_conv[0].bn.training
    thawed = tiny(freeze_batch_norm=False).train()
    assert thawed.network[0][0].convffn.conv.bn.training


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 320), (192, 128)])
@torch.no_grad()
def test_any_multiple_of_64(height: int, width: int) -> None:
    outputs = tiny()(random_pixels(2, height, width))
    assert outputs.last_hidden_state.shape == (2, 256, height // 64, width // 64)
    assert outputs.pooler_output.shape == (2, 768)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 100, 128), "100 high and 128 wide.*multiples of 64"),
        ((1, 3, 0, 64), "0 high"),
        ((1, 4, 64, 64), "expected \\(batch, 3"),
        ((3, 64, 64), "expected \\(batch, 3"),
    ],
)
def test_wrong_shapes_are_errors(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))
    with pytest.raises(ValueError, match="pixel_values is missing"):
        tiny()()


@torch.no_grad()
def test_images_of_a_batch_do_not_meet() -> None:
    model, pixels = tiny(), random_pixels(3, 64, 128)
    together = model(pixels).last_hidden_state
    for index in range(3):
        assert relative_error(together[index], model(pixels[index : index + 1]).last_hidden_state[0]) < 1e-5


@torch.no_grad()
def test_hidden_states_are_the_five_stages() -> None:
    model = tiny()
    outputs = model(random_pixels(1, 128, 192), output_hidden_states=True)
    shapes = [tuple(state.shape) for state in outputs.hidden_states]
    assert shapes == [(1, 8, 32, 48), (1, 16, 16, 24), (1, 32, 8, 12), (1, 64, 4, 6), (1, 128, 2, 3)]
    last = model.conv_exp(outputs.hidden_states[-1])
    assert torch.equal(last, outputs.last_hidden_state)
    assert model(random_pixels(1, 128, 192)).hidden_states is None


@torch.no_grad()
def test_attentions_of_stages_4_and_5() -> None:
    model = tiny(depths=[1, 1, 1, 4, 2])
    model.set_attn_implementation("eager")
    attentions = model(random_pixels(1, 128, 192), output_attentions=True).attentions
    assert [tuple(a.shape) for a in attentions] == [(1, 2, 24, 24)] * 4 + [(1, 4, 6, 6)] * 2
    for weights in attentions:
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


@torch.no_grad()
def test_eager_and_sdpa_agree() -> None:
    model, pixels = tiny(), random_pixels(1, 128, 192)
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(pixels).last_hidden_state
    model.set_attn_implementation("eager")
    assert relative_error(model(pixels).last_hidden_state, sdpa) < 1e-5


def test_attention_goes_through_transformers_interface() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    def counting(module, query, key, value, mask, **kwargs):
        calls.append((tuple(query.shape), mask, kwargs["is_causal"]))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("counting", counting)
    model = tiny()
    model.set_attn_implementation("counting")
    model(random_pixels(1, 64, 64))
    assert calls == [((1, 2, 4, 32), None, False), ((1, 4, 1, 32), None, False)]


@torch.no_grad()
def test_pooled_output_with_and_without_head() -> None:
    pixels = random_pixels(1, 64, 128)
    with_head = tiny(projection_dim=48)
    outputs = with_head(pixels)
    mean = outputs.last_hidden_state.mean((2, 3))
    assert relative_error(outputs.pooler_output, mean @ with_head.head.proj) < 1e-6
    without = tiny(projection_dim=None)
    outputs = without(pixels)
    assert relative_error(outputs.pooler_output, outputs.last_hidden_state.mean((2, 3))) < 1e-6


def enable_checkpointing(model: FastViTHDModel) -> None:
    """Enable gradient checkpointing by the name that this version of Transformers prefers."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("form", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(form: bool) -> None:
    pixels, gradients = random_pixels(1, 64, 64), []
    for checkpointing in (False, True):
        model = tiny(reparameterized=form, freeze_batch_norm=True).train()
        if checkpointing:
            enable_checkpointing(model)
            assert all(block.gradient_checkpointing for block in model.network[7])
        model(pixels).last_hidden_state.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][n], gradients[1][n], rtol=1e-5, atol=1e-9) for n in gradients[0])


def test_stochastic_depth() -> None:
    model = tiny(depths=[2, 2, 2, 2, 2], drop_path_rate=0.9, layer_scale_init_value=1.0)
    rates = [block.drop_path.rate for index in (0, 2, 4, 7, 10) for block in model.network[index]]
    assert rates == pytest.approx([0.9 * i / 9 for i in range(10)])
    pixels = random_pixels(1, 64, 64)
    with torch.no_grad():
        still = [model(pixels).last_hidden_state for _ in range(2)]
        model.train()
        torch.manual_seed(1)
        moving = [model(pixels).last_hidden_state for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(*moving)
    # A dropped branch leaves its input; a kept one is scaled so that the expectation is unchanged.
    drop = model.network[10][1].drop_path
    branch = torch.ones(20000, 1, 1, 1)
    values = drop(branch).flatten()
    assert sorted(set(values.tolist())) == pytest.approx([0.0, 10.0])
    assert values.mean().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kind", ["pool", "conv"])
@torch.no_grad()
def test_multi_scale(kind: str) -> None:
    plain, model = tiny(), tiny(multi_scale=kind)
    model.load_state_dict(plain.state_dict(), strict=False)
    pixels = random_pixels(1, 128, 192)
    expected, outputs = plain(pixels), model(pixels, output_hidden_states=True)
    assert outputs.last_hidden_state.shape == (1, 8 + 16 + 32 + 64 + 256, 2, 3)
    assert torch.equal(outputs.last_hidden_state[:, -256:], expected.last_hidden_state)
    assert torch.equal(outputs.pooler_output, expected.pooler_output)
    if kind == "pool":
        first = outputs.hidden_states[0].unfold(2, 16, 16).unfold(3, 16, 16).mean((-1, -2))
        assert relative_error(outputs.last_hidden_state[:, :8], first) < 1e-5


@torch.no_grad()
def test_backbone_gives_the_models_stages() -> None:
    model = tiny()
    pixels = random_pixels(1, 128, 192)
    states = model(pixels, output_hidden_states=True).hidden_states
    backbone = FastViTHDBackbone(FastViTHDConfig(**TINY, out_features=["stage1", "stage3", "stage5"])).eval()
    kept = backbone.state_dict().keys()
    backbone.load_state_dict({name: value for name, value in model.state_dict().items() if name in kept})
    maps = backbone(pixels).feature_maps
    assert backbone.channels == [8, 32, 128]
    assert all(torch.equal(a, b) for a, b in zip(maps, (states[0], states[2], states[4]), strict=True))
    assert backbone(pixels, output_hidden_states=True).hidden_states[1].shape == states[1].shape


@torch.no_grad()
def test_encoder_and_backbone_out_of_a_whole_checkpoint(checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    directory, pixels = checkpoint("qwen2_tied"), random_pixels(1, 128, 128)
    whole = AutoModel.from_pretrained(directory).vision_tower
    encoder, info = FastViTHDModel.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = whole(pixels, output_hidden_states=True)
    assert relative_error(encoder(pixels).last_hidden_state, expected.last_hidden_state) < 1e-5
    assert relative_error(encoder(pixels).pooler_output, expected.pooler_output) < 1e-5
    backbone = FastViTHDBackbone.from_pretrained(directory, out_indices=[2, 5])
    maps = backbone(pixels).feature_maps
    assert relative_error(maps[0], expected.hidden_states[1]) < 1e-5
    assert relative_error(maps[1], expected.hidden_states[4]) < 1e-5
    assert "LOAD REPORT" not in caplog.text


@torch.no_grad()
def test_encoder_saves_and_loads_by_itself(tmp_path: Path) -> None:
    model, pixels = tiny(), random_pixels(1, 64, 64)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is FastViTHDModel
    assert relative_error(again(pixels).last_hidden_state, model(pixels).last_hidden_state) < 1e-5
    backbone = FastViTHDBackbone.from_pretrained(tmp_path, out_features=["stage2"])
    assert backbone(pixels).feature_maps[0].shape == (1, 16, 8, 8)


def test_auto_backbone(checkpoint) -> None:
    # AutoBackbone.from_pretrained asks the hub before it looks for a directory, so this tests its later steps.
    whole = AutoConfig.from_pretrained(checkpoint("qwen2_tied"))
    for config in (whole, whole.vision_config):
        assert type(AutoBackbone.from_config(config)) is FastViTHDBackbone
        assert AutoBackbone._model_mapping[type(config)] is FastViTHDBackbone


def amplified(model: FastViTHDModel, size: float, pixels: torch.Tensor) -> FastViTHDModel:
    """Scale `model`: its last stage's output reaches `size` for `pixels`, its features have a normal size."""
    before = (
        model.network[8].proj[0].lkb_reparam,
        model.network[8].proj[1].reparam_conv,
        model.network[9].reparam_conv,
    )
    for _ in range(12):  # the network is not linear, so the factor is found iteratively
        reached = model(pixels, output_hidden_states=True).hidden_states[-1].abs().max()
        for conv in before:
            conv.weight.mul_((size / reached) ** (1 / 3))
    model.conv_exp.reparam_conv.weight.mul_(100.0 / model(pixels).last_hidden_state.abs().max())
    return model


@pytest.mark.parametrize("size", [60_900.0, 300_000.0])
@pytest.mark.parametrize("how", ["weights", "autocast"])
@torch.no_grad()
def test_float16_does_not_overflow_where_activations_are_huge(size: float, how: str, checkpoint) -> None:
    pixels = random_pixels(1, 128, 128)
    model = amplified(FastViTHDModel.from_pretrained(checkpoint("qwen2_tied")), size, pixels)
    assert max(p.abs().max() for p in model.parameters()) < 60_000
    expected = model(pixels, output_hidden_states=True)
    assert expected.hidden_states[-1].abs().max() > 0.9 * size
    assert 1 < expected.last_hidden_state.abs().max() < 60_000
    if how == "weights":
        half = model.half()(pixels.half())
        assert half.last_hidden_state.dtype == half.pooler_output.dtype == torch.float16
    else:
        with torch.autocast("cpu", dtype=torch.float16):
            half = model(pixels)
    assert half.pooler_output.isfinite().all()
    assert relative_error(half.last_hidden_state, expected.last_hidden_state) < 2e-2


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
@torch.no_grad()
def test_half_precision_is_close(dtype: torch.dtype, limit: float) -> None:
    model, pixels = tiny(), random_pixels(1, 128, 128)
    expected = model(pixels).last_hidden_state
    outputs = model.to(dtype)(pixels)  # pixel values of another dtype are converted
    assert outputs.last_hidden_state.dtype == outputs.pooler_output.dtype == dtype
    assert relative_error(outputs.last_hidden_state, expected) < limit


@torch.no_grad()
def test_compiles_without_graph_breaks() -> None:
    model, pixels = tiny(), random_pixels(1, 64, 128)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(pixels).last_hidden_state, model(pixels).last_hidden_state) < 1e-5


@torch.no_grad()
def test_return_dict_false() -> None:
    outputs = tiny()(random_pixels(1, 64, 64), return_dict=False)
    assert isinstance(outputs, tuple) and len(outputs) == 2
