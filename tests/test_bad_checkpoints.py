# SPDX-License-Identifier: Apache-2.0
"""Damaged and foreign checkpoints: each is a clear error, never a half-initialised model."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from test_registration_order import run
from transformers_fastvlm import (
    FastViTHDBackbone,
    FastViTHDModel,
    FastVLMForConditionalGeneration,
    FastVLMModel,
    FastVLMProcessor,
)
from transformers_fastvlm.checkpoints import convert
from transformers_fastvlm.engines import Sampling, load_engine


@pytest.fixture
def copy(checkpoint, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(checkpoint("qwen2_untied"), target)
    return target


def rewrite(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForImageTextToText.from_pretrained(copy)


@pytest.mark.parametrize("size", [0, 4, 1000, 100_000])
def test_truncated_weights(size: int, copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(OSError, match=f"{re.escape(str(copy))}.*truncated or damaged"):
        AutoModelForImageTextToText.from_pretrained(copy)


def test_missing_shard(copy: Path) -> None:
    model = FastVLMForConditionalGeneration.from_pretrained(copy)
    sharded = copy / "sharded"
    model.save_pretrained(sharded, max_shard_size="300KB")
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=re.escape(shard.name)):
        AutoModelForImageTextToText.from_pretrained(sharded)


def test_unknown_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    rewrite(copy, tensors | {"model.vision_resampler.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"does not know: model\.vision_resampler\.weight"):
        AutoModelForImageTextToText.from_pretrained(copy)


def test_missing_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.mm_projector.2.bias"]
    rewrite(copy, tensors)
    with pytest.raises(ValueError, match=r"no values for.*multi_modal_projector\.linear_2\.bias"):
        AutoModelForImageTextToText.from_pretrained(copy)


def test_wrong_shape(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.mm_projector.0.weight"] = torch.zeros(64, 128)
    rewrite(copy, tensors)
    with pytest.raises(ValueError, match=r"other shapes.*linear_1.weight"):
        AutoModelForImageTextToText.from_pretrained(copy)


ENCODER = "model.vision_tower.vision_tower.model."
PROJECTOR = "model.mm_projector."
# Tensors to remove from a checkpoint, by prefix, and the classes that need them.
MISSING = {
    "projector": (PROJECTOR, [FastVLMForConditionalGeneration, FastVLMModel]),
    "stage 4": (
        ENCODER + "network.7.",
        [FastVLMForConditionalGeneration, FastVLMModel, FastViTHDModel, FastViTHDBackbone],
    ),
    "encoder": (ENCODER, [FastVLMForConditionalGeneration, FastVLMModel, FastViTHDModel, FastViTHDBackbone]),
    "everything": ("", [FastVLMForConditionalGeneration, FastVLMModel, FastViTHDModel, FastViTHDBackbone]),
}
QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "fp8": {"quant_method": "fp8"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("what", MISSING)
def test_missing_tensors_whatever_config_json_says(what: str, quantization: str, copy: Path) -> None:
    """A missing tensor is an error and never gets random values: quantized or not, in a whole model or an encoder."""
    start, classes = MISSING[what]
    tensors = load_file(copy / "model.safetensors")
    rewrite(copy, {name: t for name, t in tensors.items() if not name.startswith(start)} or {"x": torch.zeros(1)})
    config = json.loads((copy / "config.json").read_text())
    if settings := QUANTIZATIONS[quantization]:
        if settings["quant_method"] == "bitsandbytes":
            pytest.importorskip("bitsandbytes")
        (copy / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for cls in classes:
        with pytest.raises(ValueError, match=r"no values for tensors|no tensor of this model"):
            cls.from_pretrained(copy)


def test_encoder_out_of_another_models_weights(copy: Path) -> None:
    rewrite(copy, {"model.layers.0.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"no tensor of this model and belongs to another one"):
        FastViTHDModel.from_pretrained(copy)


PROJECTOR_WEIGHT = "model.mm_projector.0.weight"
OURS = "model.multi_modal_projector.linear_1.weight"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64], ids=str)
def test_weights_that_are_no_weights(dtype: torch.dtype, copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    rewrite(copy, tensors | {PROJECTOR_WEIGHT: tensors[PROJECTOR_WEIGHT].to(dtype)})
    loads: list[Any] = [
        FastVLMForConditionalGeneration.from_pretrained,
        lambda _: convert(copy, tmp_path / "o", "apple"),
    ]
    for load in loads:
        with pytest.raises(ValueError, match=r"1 tensors that are not weights: model\.multi_modal_projector.*type"):
            load(copy)
    if dtype != torch.complex64:  # safetensors itself does not read complex64
        assert FastViTHDModel.from_pretrained(copy)  # the encoder's own tensors are weights


def pickled(directory: Path, tensors: dict[str, torch.Tensor], **options: Any) -> None:
    (directory / "model.safetensors").unlink(missing_ok=True)
    torch.save(tensors, directory / "pytorch_model.bin", **options)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickled_weights_are_judged_alike(legacy: bool, copy: Path) -> None:
    options = {"_use_new_zipfile_serialization": not legacy}
    tensors = load_file(copy / "model.safetensors")
    whole = FastVLMForConditionalGeneration.from_pretrained(copy)
    weight = tensors[PROJECTOR_WEIGHT]
    pickled(copy, tensors | {OURS: weight.clone()}, **options)
    model = FastVLMForConditionalGeneration.from_pretrained(copy)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.state_dict().items())
    wrong: list[tuple[dict[str, torch.Tensor], str]] = [
        ({PROJECTOR_WEIGHT: weight.to(dtype)}, r"pytorch_model\.bin holds 1 tensors that are not weights")
        for dtype in (torch.int8, torch.uint8, torch.bool, torch.complex64)
    ]
    wrong.append(({OURS: weight + 1}, r"linear_1\.weight is stored 2 times with different values"))
    for change, message in wrong:
        pickled(copy, tensors | change, **options)
        with pytest.raises(ValueError, match=message):
            FastVLMForConditionalGeneration.from_pretrained(copy)


def test_pickled_shard_outside_of_the_folder(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    pickled(copy.parent, tensors)
    (copy / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../pytorch_model.bin")}
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names the shard .*same directory"):
        AutoModelForImageTextToText.from_pretrained(copy)


def test_one_tensor_with_two_values(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    rewrite(copy, tensors | {OURS: tensors[PROJECTOR_WEIGHT].clone()})
    assert FastVLMForConditionalGeneration.from_pretrained(copy)  # the same tensor twice
    rewrite(copy, tensors | {OURS: tensors[PROJECTOR_WEIGHT] + 1})
    with pytest.raises(ValueError, match=r"linear_1\.weight is stored 2 times with different values"):
        AutoModelForImageTextToText.from_pretrained(copy)


def sharded(copy: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    (copy / "model.safetensors").unlink()
    for name, tensors in shards.items():
        save_file(tensors, copy / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_one_tensor_in_two_shards(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    other = {PROJECTOR_WEIGHT: tensors[PROJECTOR_WEIGHT] + 1}
    sharded(copy, {"a.safetensors": tensors, "b.safetensors": other})
    with pytest.raises(ValueError, match=r"stored 2 times with different values.*a\.safetensors, .*b\.safetensors"):
        AutoModelForImageTextToText.from_pretrained(copy)


@pytest.mark.parametrize("where", ["../outside.safetensors", "{tmp}/outside.safetensors"])
def test_shard_outside_of_the_folder(where: str, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors, copy.parent / "outside.safetensors", metadata={"format": "pt"})
    (copy / "model.safetensors").unlink()
    name = where.format(tmp=copy.parent)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    for cls in (AutoModelForImageTextToText, FastViTHDModel):
        with pytest.raises(ValueError, match=r"names the shard .*same directory"):
            cls.from_pretrained(copy)


def test_weights_that_are_nan(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(copy, tensors | {name: torch.full_like(tensors[name], float("nan"))})
    engine = load_engine("transformers", str(copy), device="cpu")
    with pytest.raises(ValueError, match=r"first scores are NaN"):
        engine.generate([[{"role": "user", "content": "Hi"}]], Sampling(max_new_tokens=4))
    model = AutoModelForImageTextToText.from_pretrained(copy)
    with pytest.raises(ValueError, match=r"first scores are NaN"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=4)


def test_tokenizer_beyond_the_embeddings(copy: Path) -> None:
    """Loading refuses a tokenizer with more tokens than the model, and the model refuses ids without an embedding."""
    processor = FastVLMProcessor.from_pretrained(copy)
    processor.tokenizer.add_tokens([f"<box{number}>" for number in range(40)])
    processor.save_pretrained(copy)
    with pytest.raises(ValueError, match=r"the tokenizer gives '<box39>' the id 523, but .* embeddings for 0 to 511"):
        load_engine("transformers", str(copy), device="cpu")
    model = AutoModelForImageTextToText.from_pretrained(copy)
    for ids, message in {523: r"holds 523, but .*0 to 511", -3: r"holds -3, but", -200: r"-200, the pl"}.items():
        with pytest.raises(ValueError, match=message):
            model(torch.tensor([[5, ids, 6]]))
        with pytest.raises(ValueError, match=message):
            model.generate(torch.tensor([[5, ids, 6]]), max_new_tokens=2)


def test_calls_of_apples_remote_code(copy: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(copy)
    with pytest.raises(ValueError, match=r"placeholder of Apple's remote code.*apply_chat_template.*migration"):
        model.generate(torch.tensor([[5, -200, 6]]), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"images=.*remote code.*apply_chat_template"):
        model.generate(torch.tensor([[5, 6]]), images=torch.zeros(1, 3, 64, 64), max_new_tokens=2)
    with pytest.raises(AttributeError, match=r"get_vision_tower.*remote code.*apply_chat_template"):
        model.get_vision_tower()


def test_another_placeholder_in_the_tokenizer(copy: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(copy)
    pixels = torch.zeros(1, 3, 256, 256)
    with pytest.raises(ValueError, match=r"image_token_id is 483; .* times is 484\. .*config\.image_token_id"):
        model(torch.tensor([[5, *[484] * 16, 6]]), pixel_values=pixels)
    with pytest.raises(ValueError, match=r"Let the processor make both"):
        model(torch.tensor([[5, 6]]), pixel_values=pixels)


def test_model_without_its_tokenizer(copy: Path, tmp_path: Path) -> None:
    AutoModelForImageTextToText.from_pretrained(copy).save_pretrained(tmp_path / "saved")
    for cls in (AutoProcessor, FastVLMProcessor):
        with pytest.raises(OSError, match=r"saved has no tokenizer files.*processor.save_pretrained.*processing_class"):
            cls.from_pretrained(tmp_path / "saved")


def test_foreign_checkpoint(copy: Path) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text()) | {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    path.write_text(json.dumps(config))
    # AutoProcessor turns every error into "Unrecognized processing class", so FastVLMProcessor is used.
    for load in (AutoModelForImageTextToText.from_pretrained, FastVLMProcessor.from_pretrained):
        with pytest.raises(ValueError, match="clip-vit-large-patch14-336"):
            load(copy)


def test_config_that_is_not_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config\.json.*not a valid JSON"):
        AutoModelForImageTextToText.from_pretrained(copy)


def test_pickled_weights_are_not_executed(copy: Path, tmp_path: Path) -> None:
    """A checkpoint that has only a pickle with code in it is refused, and the code does not run."""
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload()}, copy / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights_only|unsupported|unsafe|safetensors"):
        AutoModelForImageTextToText.from_pretrained(copy)
    assert not marker.exists()


def test_no_network(tmp_path: Path) -> None:
    """A hub name that is neither cached nor reachable gives an error with advice."""
    code = """
        import transformers_fastvlm
        from transformers import AutoModelForImageTextToText, AutoProcessor
        for load in (AutoModelForImageTextToText.from_pretrained, AutoProcessor.from_pretrained):
            try:
                load("apple/FastVLM-0.5B")
            except OSError as error:
                print("OSError", "couldn't connect" in str(error))
    """
    assert run(code, HF_HOME=str(tmp_path)).splitlines() == ["OSError True"] * 2
