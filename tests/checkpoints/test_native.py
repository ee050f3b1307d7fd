# SPDX-License-Identifier: Apache-2.0
"""The layout of Transformers' own `fast_vlm`: its names, that it loads there, and that it answers as the reference."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers import expand, golden_images, relative_error
from transformers_fastvlm.checkpoints import convert
from transformers_fastvlm.checkpoints.layouts import to_our_name
from transformers_fastvlm.checkpoints.native import EXTRA_FILE, NOT_IN_NATIVE, from_native_name, to_native_name
from transformers_fastvlm.image_processing_pil_fastvlm import FastVLMImageProcessorPil

timm = pytest.importorskip("timm")

TINY = {"layers": (1, 1, 2, 1, 1), "embed_dims": (8, 16, 32, 64, 128)}
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("index", "arguments"),
    [
        ("vision_full_weights.json", {"inference_mode": True}),
        ("qwen2_tied/weights.json", TINY | {"inference_mode": True}),
        ("train_form_weights.json", TINY | {"inference_mode": False}),
    ],
    ids=["full", "tiny", "train_time"],
)
def test_names_and_shapes_are_timms(golden: Path, index: str, arguments: dict):
    with torch.device("meta"):
        model = timm.create_model("fastvit_mci3", num_classes=0, **arguments)
    theirs = {f"model.vision_tower.timm_model.{name}": list(x.shape) for name, x in model.state_dict().items()}
    specs = {to_our_name(name): spec["shape"] for name, spec in json.loads((golden / index).read_text()).items()}
    ours = {name: shape for name, shape in specs.items() if "vision_tower" in name and name not in NOT_IN_NATIVE}
    assert {to_native_name(name): shape for name, shape in ours.items()} == theirs
    assert [from_native_name(to_native_name(name)) for name in ours] == list(ours)


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.timm_model.stages.0.blocks.0.other.weight",
        "model.vision_tower.timm_model.head.fc.weight",
        "model.vision_tower.patch_embed.0.reparam_conv.weight",
        "model.layers.0.mlp.up_proj.weight",
    ],
)
def test_unknown_names(name: str):
    assert from_native_name(name) is None


def load_native(directory: Path):
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert type(model).__name__ == "FastVlmForConditionalGeneration"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied", "llama"])
@torch.no_grad()
def test_native_port_answers_as_the_reference(checkpoint, golden: Path, tmp_path: Path, name: str):
    convert(checkpoint(name), tmp_path / "native", "native")
    model = load_native(tmp_path / "native")
    case = json.loads((golden / name / "expected.json").read_text())["single0"]
    reference = load_file(golden / name / "expected.safetensors")
    images = FastVLMImageProcessorPil(size={"height": 256, "width": 256})(golden_images(golden, [case["image"]]))
    pixels = torch.as_tensor(images["pixel_values"][0])[None]
    features = model.get_image_features(pixel_values=pixels).pooler_output
    assert relative_error(features[0], reference["features"][0]) < 1e-5
    ids = expand(case["input_ids"], [len(features[0])], model.config.image_token_id)
    logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
    assert relative_error(logits, reference["single0.logits_last"]) < 1e-5


def test_processor_loads_without_this_package(checkpoint, tmp_path: Path):
    pytest.importorskip("torchvision")
    convert(checkpoint("qwen2_tied"), tmp_path / "native", "native")
    processor = AutoProcessor.from_pretrained(tmp_path / "native")
    assert type(processor).__name__ == "LlavaProcessor"
    assert processor.image_token_id == 483
    image = torch.full((3, 64, 128), 255, dtype=torch.uint8)
    inputs = processor(images=[image], text=["<image>\nWhat?"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 256, 256)
    assert inputs["pixel_values"][0, :, 0].max() < 0.01, "padded with black above and below"
    assert (inputs["input_ids"] == 483).sum() == 16


def test_what_the_port_has_no_place_for_is_kept_beside(checkpoint, tmp_path: Path):
    done = convert(checkpoint("qwen2_anyres"), tmp_path / "native", "native")
    assert load_file(tmp_path / "native" / EXTRA_FILE).keys() == NOT_IN_NATIVE.keys()
    assert any("AnyRes" in note for note in done.notes)


@torch.no_grad()
def test_a_full_vocabulary_grows_for_the_image_token_and_shrinks_again(checkpoint, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors |= {name: tensors[name][:483].clone() for name in (EMBEDDING, "lm_head.weight")}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 483}))

    done = convert(source, tmp_path / "native", "native")
    assert done.notes == ("the vocabulary grew from 483 to 512 rows, to hold <image> (483)",)
    logits = load_native(tmp_path / "native")(input_ids=torch.tensor([[1, 2, 3]])).logits[0]
    assert logits.argmax(-1).max() < 483
    convert(tmp_path / "native", tmp_path / "back", "apple")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in back)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 483


def test_conversions_by_others_are_read(checkpoint, tmp_path: Path):
    """Others' directories have no CLIP head, more rows, and nothing of what this package writes beside the weights."""
    convert(checkpoint("qwen2_untied"), tmp_path / "native", "native")
    model = load_native(tmp_path / "native")
    del model.config.fastvlm
    model.resize_token_embeddings(576, mean_resizing=False)
    theirs = tmp_path / "theirs"
    model.save_pretrained(theirs)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(tmp_path / "native" / file, theirs)

    done = convert(theirs, tmp_path / "apple", "apple")
    config = json.loads((tmp_path / "apple" / "config.json").read_text())
    assert (config["mm_vision_tower"], config["image_aspect_ratio"]) == ("mobileclip_l_256", "pad")
    assert (config["vocab_size"], config["vision_config"]["projection_dim"]) == (576, 0)
    assert "image_token_id" not in config, "the tokenizer says it"
    assert any("'pad'" in note for note in done.notes)
    ours, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "apple", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(ours.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert ours.config.image_token_id == model.config.image_token_id


def test_encoders_that_timm_cannot_be(checkpoint, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["attention_head_dim"] = 16
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"attention_head_dim=16; .*'transformers' instead"):
        convert(source, tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


def test_other_encoders_of_the_port(checkpoint, tmp_path: Path):
    convert(checkpoint("llama"), tmp_path / "native", "native")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    for change in ({"architecture": "vit_base_patch16_224"}, {"model_args": {"lkc_use_act": False}}):
        changed = config | {"vision_config": config["vision_config"] | change}
        (tmp_path / "native" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="expected timm's fastvit_mci3"):
            convert(tmp_path / "native", tmp_path / "out", "apple")
