# SPDX-License-Identifier: Apache-2.0
"""Adapters: which layers get them, that nothing else learns, and that saved, loaded and merged they answer the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import golden_images, relative_error
from transformers_fastvlm import FastVLMForConditionalGeneration, FastVLMProcessor
from transformers_fastvlm.training import add_lora, lora_config, merge
from transformers_fastvlm.training.lora import attach, require

peft = pytest.importorskip("peft", reason="adapters need peft")

# peft asks models for a property that Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

Model = FastVLMForConditionalGeneration
DECODER = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def load(directory: Path, **options: Any) -> Any:
    return Model.from_pretrained(directory, **options)


@pytest.fixture
def inputs(checkpoint: Callable[[str], Path], golden: Path) -> Any:
    """A question about an image of 64 pixels, for the model qwen2_tied."""
    processor = FastVLMProcessor.from_pretrained(checkpoint("qwen2_tied"), size=64)
    return processor(text="<image>\nWhat?", images=golden_images(golden, ["wide_rgb.png"]), return_tensors="pt")


def adapted(model: nn.Module) -> set[str]:
    """Return the names of the layers that have an adapter."""
    return {name.split(".lora_A.")[0].removeprefix("base_model.model.") for name in names(model) if ".lora_A." in name}


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def randomize(model: nn.Module, scale: float = 0.3) -> None:
    """Give adapters, which begin as zero, an effect."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.mark.parametrize("name", ["qwen2_tied", "llama"])
def test_default_targets_are_the_linear_layers_of_the_decoder(name: str, checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint(name))
    layers = model.config.text_config.num_hidden_layers
    expected = {f"model.language_model.layers.{layer}.{target}" for layer in range(layers) for target in DECODER}
    assert adapted(add_lora(model)) == expected


def test_targets_in_encoder_and_projector(checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint("qwen2_tied"))
    modules = dict(model.named_modules())
    wrapped = add_lora(model, r=2, parts=["vision_tower", "projector"])
    found = adapted(wrapped)
    projector = {f"model.multi_modal_projector.linear_{number}" for number in (1, 2)}
    assert projector <= found
    encoder = {name.removeprefix("model.vision_tower.network.") for name in found - projector}
    blocks = {
        f"{stage}.{block}" for stage, depth in ((0, 1), (2, 1), (4, 2), (7, 1), (10, 1)) for block in range(depth)
    }
    attention = {f"{block}.token_mixer.{layer}" for block in ("7.0", "10.0") for layer in ("qkv", "proj")}
    assert encoder == attention | {f"{block}.convffn.{layer}" for block in blocks for layer in ("fc1", "fc2")}
    assert all(isinstance(modules[name], nn.Linear) or modules[name].kernel_size == (1, 1) for name in found)


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"targets": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}),
        ({"targets": r".*language_model\..*\.up_proj"}, {"up_proj"}),
        ({"targets": ["linear_2", "k_proj"], "parts": ["projector", "language_model"]}, {"linear_2", "k_proj"}),
    ],
)
def test_targets_by_name(options: dict[str, Any], ends: set[str], checkpoint: Callable[[str], Path]) -> None:
    found = adapted(add_lora(load(checkpoint("qwen2_tied")), **options))
    assert {name.rpartition(".")[2] for name in found} == ends
    assert not any("vision_tower" in name for name in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ["decoder"]}, "no part 'decoder'; expected some of vision_tower, projector, language_model"),
        ({"parts": []}, "parts is empty"),
        ({"parts": "projector", "whole": "projector"}, "projector is in both parts and whole"),
        ({"whole": "language_model", "parts": "projector"}, "cannot be fully trained together with adapters"),
        ({"targets": ["q_proj", "query"]}, "targets has 'query', .* expected some of down_proj, gate_proj"),
        ({"config": object(), "r": 4}, "config and r are both given"),
    ],
)
def test_what_cannot_be_adapted_is_named(
    options: dict[str, Any], message: str, checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(load(checkpoint("qwen2_tied")), **options)


def test_moving_statistics_are_refused(checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint("qwen2_tied"))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.frozen = False  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"BatchNorm layers of the encoder, such as .* which an adapter does not hold"):
        lora_config(model)
    lora_config(model, whole="vision_tower")


def test_a_missing_package_names_its_command() -> None:
    with pytest.raises(ImportError, match=r'Training needs pefd: pip install "transformers-fastvlm\[training\]"'):
        require("pefd")


def test_only_adapters_and_what_is_trained_whole_get_gradients(checkpoint: Callable[[str], Path], inputs: Any) -> None:
    model = add_lora(load(checkpoint("qwen2_tied")), r=4, whole=["projector"])
    model.train()
    model(**inputs, labels=inputs["input_ids"].clamp(max=9)).loss.backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {name for name in names(model) if ".lora_" in name or ".modules_to_save." in name}
    assert len([name for name in learned if ".modules_to_save." in name]) == 4
    assert learned == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_never_gets_a_gradient_stays_frozen(checkpoint: Callable[[str], Path]) -> None:
    model = add_lora(load(checkpoint("qwen2_tied")), r=4, whole=["vision_tower"])
    heads = {name: one.requires_grad for name, one in model.named_parameters() if name.endswith("head.proj")}
    assert len(heads) == 2 and not any(heads.values())
    assert sum(one.requires_grad for name, one in model.named_parameters() if "vision_tower" in name) > 50


@pytest.mark.parametrize("parts", [["language_model"], ["vision_tower", "projector", "language_model"]])
def test_saved_loaded_and_merged_it_answers_the_same(
    parts: list[str], checkpoint: Callable[[str], Path], inputs: Any, tmp_path: Path
) -> None:
    directory = checkpoint("qwen2_tied")
    model = add_lora(load(directory), r=4, parts=parts).eval()
    randomize(model)
    ask = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        logits, tokens = model(**inputs).logits, model.generate(**inputs, **ask)
        base = load(directory)
        assert relative_error(base(**inputs).logits, logits) > 0.1
        assert not base.generate(**inputs, **ask).equal(tokens)

        model.save_pretrained(tmp_path)
        for again in (attach(load(directory), tmp_path), load(tmp_path)):
            assert relative_error(again(**inputs).logits, logits) < 1e-4
        merged = merge(model)
        assert type(merged) is Model and not [name for name in names(merged) if "lora" in name]
        assert relative_error(merged(**inputs).logits, logits) < 1e-4
        assert merged.generate(**inputs, **ask).equal(tokens)


def test_merging_rounds_once(checkpoint: Callable[[str], Path]) -> None:
    """Of weights in bfloat16, the sum is what float32 gives, rounded."""
    models = [load(checkpoint("qwen2_tied"), dtype=torch.bfloat16) for _ in range(2)]
    models[0].float()
    wrapped = [add_lora(model, r=4) for model in models]
    randomize(wrapped[0], scale=0.05)
    adapters = {name: parameter for name, parameter in wrapped[0].named_parameters() if ".lora_" in name}
    wrapped[1].load_state_dict(adapters, strict=False)
    exact, rounded = (merge(model).state_dict() for model in wrapped)
    assert [name for name in exact if not rounded[name].equal(exact[name].to(rounded[name].dtype))] == []
    assert rounded["model.language_model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_merging_a_broken_adapter_is_refused(checkpoint: Callable[[str], Path]) -> None:
    model = add_lora(load(checkpoint("qwen2_tied")), r=4)
    next(one for name, one in model.named_parameters() if ".lora_B." in name).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs"):
        merge(model)


def test_an_adapter_of_another_model_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = add_lora(load(checkpoint("qwen2_tied")), r=4, targets=["q_proj"])
    model.save_pretrained(tmp_path)
    other = load(checkpoint("qwen2_tied"))
    del other.model.language_model.layers[1:]
    with pytest.raises(ValueError, match="does not fit its base model"):
        attach(other, without(tmp_path, "layers.0."))
    wider = load(checkpoint("qwen2_tied"))
    wider.model.language_model.layers[0].self_attn.q_proj = nn.Linear(32, 64)
    with pytest.raises(ValueError, match=r"does not fit its base model: .*size mismatch"):
        attach(wider, tmp_path)


def without(directory: Path, part: str) -> Path:
    """Take the tensors with `part` in their names out of an adapter."""
    from safetensors.torch import load_file, save_file

    file = directory / "adapter_model.safetensors"
    all_of_them = load_file(file)
    out = directory / "less"
    out.mkdir()
    (out / "adapter_config.json").write_bytes((directory / "adapter_config.json").read_bytes())
    save_file({name: tensor for name, tensor in all_of_them.items() if part not in name}, out / file.name)
    return out


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*language_model\..*\.(q|v)_proj"])
def test_peft_alone(targets: Any, checkpoint: Callable[[str], Path], inputs: Any, tmp_path: Path) -> None:
    """What the documentation of peft shows works without this package's helpers."""
    directory = checkpoint("qwen2_tied")
    model = peft.get_peft_model(load(directory), peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    assert {name.rpartition(".")[2] for name in adapted(model)} == {"q_proj", "v_proj"}
    randomize(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(directory), tmp_path)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        assert again.eval()(**inputs).logits.equal(logits)
        assert relative_error(again.merge_and_unload()(**inputs).logits, logits) < 1e-4
