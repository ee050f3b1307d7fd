# SPDX-License-Identifier: Apache-2.0
"""Adapters put into weights, those of LLaVA code among them: files as its training leaves them, answers as it gives."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2ForCausalLM

from helpers import relative_error
from transformers_fastvlm import FastViTHDModel, FastVLMConfig, FastVLMForConditionalGeneration, FastVLMProcessor
from transformers_fastvlm.training import add_lora, load_merged, merge_adapter

peft = pytest.importorskip("peft", reason="adapters need peft")

# peft asks models for a property that Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = torch.arange(3, 40)[None]


class Inner(nn.Module):
    """A name on the way: `….vision_tower.vision_tower` and `….vision_tower.model`."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        setattr(self, name, module)


class LlavaCode(Qwen2ForCausalLM):
    """A model with the modules, and so the names, of LLaVA's and Apple's code."""

    def __init__(self, config: FastVLMConfig) -> None:
        super().__init__(config.text_config)
        encoder, hidden = FastViTHDModel(config.vision_config), config.text_config.hidden_size
        self.model.vision_tower = Inner("vision_tower", Inner("model", encoder))
        self.model.mm_projector = nn.Sequential(
            nn.Linear(config.vision_config.num_features, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )


class Trained:
    """A directory as LLaVA's LoRA training leaves it, and the logits that its model gives for `IDS`."""

    def __init__(self, base: Path, directory: Path, encoder_too: bool, pickled: bool) -> None:
        model = LlavaCode(FastVLMConfig.from_pretrained(base))
        model.load_state_dict(load_file(base / "model.safetensors"), strict=False)
        model.tie_weights()
        model.name_or_path = str(base)
        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        names = {name.rpartition(".")[2] for name in linear if not ("mm_projector" in name or "vision_tower" in name)}
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=sorted(names - {"lm_head"}), lora_dropout=0.05, task_type="CAUSAL_LM"
        )
        wrapped = peft.get_peft_model(model, config)
        wrapped.base_model.model.model.mm_projector.requires_grad_(True)
        if encoder_too:
            wrapped.base_model.model.model.vision_tower.requires_grad_(True)
        generator = torch.Generator().manual_seed(0)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        named = dict(wrapped.named_parameters())
        adapter = {name: one.detach() for name, one in named.items() if "lora_" in name}
        rest = {name: one.detach() for name, one in named.items() if "lora_" not in name and one.requires_grad}
        (directory / "config.json").write_bytes((base / "config.json").read_bytes())
        wrapped.save_pretrained(directory, state_dict=adapter)
        torch.save(rest, directory / "non_lora_trainables.bin")
        if pickled:  # by peft of that time
            torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
            (directory / "adapter_model.safetensors").unlink()
        self.directory, self.rest = directory, rest
        with torch.no_grad():
            self.logits = wrapped.eval()(input_ids=IDS).logits


@pytest.fixture
def trained(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Trained]:
    directory = tmp_path / "llava-lora"
    directory.mkdir()

    def make(encoder_too: bool = False, pickled: bool = False) -> Trained:
        return Trained(checkpoint("qwen2_tied"), directory, encoder_too, pickled)

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(("encoder_too", "pickled"), [(False, False), (True, True)])
def test_llavas_adapter_answers_as_in_llavas_code(
    encoder_too: bool, pickled: bool, trained: Callable[..., Trained], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    made = trained(encoder_too, pickled)
    done = merge_adapter(made.directory, tmp_path / "out")
    base, out = load_file(checkpoint("qwen2_tied") / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert set(out) == set(base) - {"lm_head.weight"} and done.layout == "apple"  # the head is tied
    changed = {name for name in out if not out[name].equal(base[name])}
    whole = {name.removeprefix("base_model.model.") for name in made.rest}
    adapted = {name for name in out if name.endswith("_proj.weight") and ".layers." in name}
    assert changed == whole | adapted and len(whole) > (50 if encoder_too else 3)
    assert [name for name in whole if not out[name].equal(made.rest[f"base_model.model.{name}"])] == []

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert relative_error(logits(model), made.logits) < 1e-5
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_token_id == model.config.image_token_id
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llava_qwen2" and "vision_config" in config


def test_an_adapter_of_apples_remote_code_is_known_by_its_names(trained: Callable[..., Trained]) -> None:
    """Without `non_lora_trainables.bin` it looks like any adapter of peft, but for Apple's names."""
    made = trained()
    (made.directory / "non_lora_trainables.bin").unlink()
    assert relative_error(logits(load_merged(made.directory)), made.logits) < 1e-5


def test_ranks_and_scales_of_single_layers_count(trained: Callable[..., Trained]) -> None:
    made = trained()
    file = made.directory / "adapter_config.json"
    pattern = {"model.layers.1.self_attn.q_proj": 16, "up_proj": 2}
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_pattern": pattern}))
    model = FastVLMForConditionalGeneration.from_pretrained(json.loads(file.read_text())["base_model_name_or_path"])
    before = {name: one.clone() for name, one in model.state_dict().items()}
    after = load_merged(made.directory, model).state_dict()
    tensors = load_file(made.directory / "adapter_model.safetensors")
    for layer, scale in (
        ("layers.1.self_attn.q_proj", 4.0),
        ("layers.0.mlp.up_proj", 0.5),
        ("layers.0.mlp.down_proj", 2),
    ):
        name = f"model.language_model.{layer}.weight"
        up, down = (tensors[f"base_model.model.model.{layer}.lora_{side}.weight"] for side in "BA")
        assert torch.allclose(after[name] - before[name], scale * up @ down, atol=1e-5), layer


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def damage(directory: Path, kind: str) -> None:
    weights = directory / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(name for name in tensors if ".lora_B." in name)
    if kind == "code":
        torch.save({"x": Evil(directory / "hacked")}, directory / "non_lora_trainables.bin")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "gone":
        weights.unlink()
    elif kind == "incomplete":
        save_file({name: one for name, one in tensors.items() if name != first}, weights)
    elif kind == "shape":
        save_file({**tensors, first: torch.zeros(3, 4)}, weights)
    elif kind == "layer":
        save_file({**tensors, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}, weights)
    elif kind == "name":
        save_file({**tensors, "base_model.model.head.lora_A.weight": torch.zeros(3)}, weights)
    elif kind == "projector":
        name = "base_model.model.model.mm_projector.0.bias"
        torch.save({name: torch.zeros(7)}, directory / "non_lora_trainables.bin")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("code", "non_lora_trainables.bin is not loaded: it is damaged, or holds more than tensors"),
        ("truncated", "adapter_model.safetensors cannot be read as safetensors"),
        ("gone", "has neither adapter_model.safetensors nor adapter_model.bin; the adapter is incomplete"),
        ("incomplete", "is incomplete: .*lora_B.* is missing"),
        ("shape", "does not fit the model: .*size mismatch"),
        ("layer", "tensors for layers that this model lacks: .*layers.9.mlp.up_proj"),
        ("name", "base_model.model.head.lora_A.weight, which is not part of an adapter"),
        ("projector", "does not fit the model: .*size mismatch"),
    ],
)
def test_damaged_adapters_are_refused(kind: str, message: str, trained: Callable[..., Trained], tmp_path: Path) -> None:
    made = trained()
    damage(made.directory, kind)
    with pytest.raises(FileNotFoundError if kind == "gone" else ValueError, match=message):
        merge_adapter(made.directory, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llava-lora"]
    assert not (made.directory / "hacked").exists()


def test_what_is_no_adapter_or_in_the_way_is_named(
    trained: Callable[..., Trained], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    made = trained()
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        merge_adapter(made.directory, made.directory)
    with pytest.raises(FileNotFoundError, match=r"gone is not a directory; expected one with adapter_config.json"):
        merge_adapter(tmp_path / "gone", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json; expected the directory of an adapter"):
        merge_adapter(checkpoint("qwen2_tied"), tmp_path / "out")
    file = made.directory / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not name the base model; pass it as base"):
        merge_adapter(made.directory, tmp_path / "out")
    file.write_text(json.dumps({**content, "peft_type": "IA3"}))
    with pytest.raises(ValueError, match="holds an adapter of type 'IA3'; expected 'LORA'"):
        merge_adapter(made.directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_this_package(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Merged into another type, at the resolution that it was trained at, with the base's licence."""
    base = tmp_path / "base"
    base.mkdir()
    for file in checkpoint("qwen2_tied").iterdir():
        (base / file.name).symlink_to(file)
    (base / "LICENSE").write_text("Apple Machine Learning Research Model ...")
    model = add_lora(FastVLMForConditionalGeneration.from_pretrained(base), r=4, whole="projector")
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or ".modules_to_save." in name:
            parameter.data.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    FastVLMProcessor.from_pretrained(base, size=192).save_pretrained(tmp_path / "adapter")
    expected = logits(model.eval())
    done = merge_adapter(tmp_path / "adapter", tmp_path / "out", layout="transformers", dtype=torch.bfloat16)
    again = FastVLMForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert done.layout == "transformers" and again.dtype == torch.bfloat16
    assert relative_error(logits(again.float()), expected) < 0.02
    assert again.config.vision_config.image_size == 192
    assert FastVLMProcessor.from_pretrained(tmp_path / "out").image_processor.size == {"height": 192, "width": 192}
    assert (tmp_path / "out" / "LICENSE").read_text().startswith("Apple Machine Learning Research Model")
