# SPDX-License-Identifier: Apache-2.0
"""The whole model against the reference's outputs, and the interface of Transformers' models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from helpers import expand, golden_images, image_names, random_pixels, relative_error
from transformers_fastvlm import (
    FastVLMConfig,
    FastVLMForConditionalGeneration,
    FastVLMImageProcessorPil,
    FastVLMModel,
)

NAMES = ["qwen2_tied", "qwen2_untied", "llama", "qwen2_anyres"]


class Reference:
    """A tiny model, its image processor, and the reference's outputs for its cases."""

    def __init__(self, golden: Path, directory: Path):
        self.golden, self.directory = golden, directory
        self.model = FastVLMForConditionalGeneration.from_pretrained(directory)
        self.image_processor = FastVLMImageProcessorPil.from_pretrained(directory)
        self.cases = json.loads((golden / directory.name / "expected.json").read_text())
        self.answers = load_file(golden / directory.name / "expected.safetensors")

    @torch.no_grad()
    def inputs(self, case: str) -> dict[str, Any]:
        names = image_names(self.cases[case])
        images: dict[str, Any] = {}
        lengths: list[int] = []
        if names:
            images = dict(self.image_processor(golden_images(self.golden, names), return_tensors="pt"))
            lengths = [len(f) for f in self.model.get_image_features(**images).pooler_output]
        ids = expand(self.cases[case]["input_ids"], lengths, self.model.config.image_token_id)
        return {"input_ids": torch.tensor([ids])} | images


@pytest.fixture(scope="module")
def reference(golden: Path, checkpoint):
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            made[name] = Reference(golden, checkpoint(name))
        return made[name]

    return get


CASES = [
    (name, case)
    for name in NAMES
    for case in ("single0", "single1", "two_images", "multi_turn", "text_only")
    if name != "qwen2_anyres" or case.startswith("single")
]


@pytest.mark.parametrize(("name", "case"), CASES)
@torch.no_grad()
def test_logits_and_tokens_equal_the_reference(name: str, case: str, reference) -> None:
    ref = reference(name)
    inputs = ref.inputs(case)
    if "length" in ref.cases[case]:
        assert inputs["input_ids"].shape[1] == ref.cases[case]["length"]
    logits = ref.model(**inputs).logits
    assert relative_error(logits[0, -1], ref.answers[f"{case}.logits_last"]) < 1e-5
    if f"{case}.logits_every_7" in ref.answers:
        assert relative_error(logits.flatten()[::7], ref.answers[f"{case}.logits_every_7"]) < 1e-5
    if f"{case}.greedy" in ref.answers:
        greedy = ref.answers[f"{case}.greedy"].tolist()
        options = {"max_new_tokens": len(greedy), "do_sample": False, "eos_token_id": None}
        out = ref.model.generate(**inputs, **options)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == greedy


@pytest.mark.parametrize("name", NAMES[:3])
@torch.no_grad()
def test_projected_features_equal_the_reference(name: str, reference, golden: Path) -> None:
    ref = reference(name)
    images = golden_images(golden, ref.cases["features"]["images"])
    outputs = ref.model.get_image_features(**ref.image_processor(images, return_tensors="pt"))
    assert relative_error(outputs.pooler_output, ref.answers["features"]) < 1e-5
    assert outputs.last_hidden_state.shape == (3, 256, 4, 4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES[:3])
@torch.no_grad()
def test_padded_batch_equals_the_reference(name: str, side: str, reference, golden: Path) -> None:
    ref = reference(name)
    batch = ref.cases["batch"]
    pixels = ref.image_processor(golden_images(golden, batch["images"]), return_tensors="pt")["pixel_values"]
    rows = [expand(ids, [16], ref.model.config.image_token_id) for ids in batch["input_ids"]]
    width = max(map(len, rows))
    pads = [[480] * (width - len(row)) for row in rows]
    ids = torch.tensor([p + r if side == "left" else r + p for p, r in zip(pads, rows, strict=True)])
    masks = [
        [0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
        for p, r in zip(pads, rows, strict=True)
    ]
    logits = ref.model(input_ids=ids, attention_mask=torch.tensor(masks), pixel_values=pixels).logits
    for index, row in enumerate(rows):
        last = -1 if side == "left" else len(row) - 1
        assert relative_error(logits[index, last], ref.answers[f"batch.logits_last.{index}"]) < 1e-5


@pytest.mark.parametrize("batch", ["sft", "plain"])
def test_loss_and_gradients_equal_the_reference(batch: str, golden: Path, checkpoint) -> None:
    ref = Reference(golden, checkpoint("qwen2_tied"))
    model = ref.model.train()
    sample = json.loads((golden / "training.json").read_text())[batch]
    inputs = training_inputs(sample, ref)
    outputs = model(**inputs)
    assert outputs.loss.item() == pytest.approx(sample["loss"], rel=1e-4)
    outputs.loss.backward()
    check_gradients(model, sample["grad_norm"])


def training_inputs(sample: dict[str, Any], ref: Reference) -> dict[str, Any]:
    """Expand a batch of training.json as the processor would, with its own padding."""
    images = [name for row in sample["samples"] for name in ([row["image"]] if row.get("image") else [])]
    pixels = ref.image_processor(golden_images(ref.golden, images), return_tensors="pt")["pixel_values"]
    token = ref.model.config.image_token_id
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels, mask in zip(sample["input_ids"], sample["labels"], sample["attention_mask"], strict=True):
        at = [index for index, value in enumerate(ids) if value == -200]
        grown = expand(ids, [16] * len(at), token)
        for index in reversed(at):
            labels = labels[:index] + [-100] * 16 + labels[index + 1 :]
            mask = mask[:index] + [1] * 16 + mask[index + 1 :]
        columns["input_ids"].append(grown)
        columns["labels"].append(labels)
        columns["attention_mask"].append(mask)
    width = max(map(len, columns["input_ids"]))
    fill = {"input_ids": 480, "labels": -100, "attention_mask": 0}
    padded = {k: torch.tensor([row + [fill[k]] * (width - len(row)) for row in rows]) for k, rows in columns.items()}
    return padded | {"pixel_values": pixels}


def apple_names(model: FastVLMForConditionalGeneration) -> dict[str, str]:
    """Return Apple's name of each of the model's parameters."""
    from transformers_fastvlm.checkpoints.layouts import to_apple_name

    return {name: str(to_apple_name(name)) for name, _ in model.named_parameters()}


def check_gradients(model: FastVLMForConditionalGeneration, expected: dict[str, float | None]) -> None:
    """Compare every parameter's gradient norm with the reference's."""
    names = apple_names(model)
    ours = {names[name]: None if p.grad is None else p.grad.norm().item() for name, p in model.named_parameters()}
    assert set(expected) - {"lm_head.weight"} == set(ours) - {"lm_head.weight"}
    for name in set(ours) & set(expected):
        if expected[name] is None:
            assert ours[name] is None, name
        else:
            assert ours[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-9), name


def test_one_trainer_step_gives_the_references_loss_and_gradients(golden: Path, checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ref = Reference(golden, checkpoint("qwen2_tied"))
    sample = json.loads((golden / "training.json").read_text())["sft"]
    inputs = training_inputs(sample, ref)
    rows = [{"row": index} for index in range(len(inputs["input_ids"]))]
    seen: dict[str, float] = {}

    class Check(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            check_gradients(model, sample["grad_norm"])
            seen["checked"] = 1.0

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.update(logs or {})

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        max_grad_norm=0,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(
        model=ref.model,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda batch: {key: value.clone() for key, value in inputs.items()},
        callbacks=[Check()],
    )
    before = {name: p.detach().clone() for name, p in ref.model.named_parameters()}
    trainer.train()
    assert seen["checked"] == 1.0
    assert seen["loss"] == pytest.approx(sample["loss"], rel=1e-4)
    moved = {name for name, p in ref.model.named_parameters() if not torch.equal(p, before[name])}
    assert not ref.model.model.vision_tower.head.proj.requires_grad  # it would never get a gradient
    assert len(moved) > 100 and not any("head.proj" in name for name in moved)


def test_num_items_in_batch_reaches_the_loss(reference) -> None:
    ref = reference("qwen2_tied")
    inputs = ref.inputs("text_only")
    labels = inputs["input_ids"].clone()
    mean = ref.model(**inputs, labels=labels).loss
    count = labels.shape[1] - 1
    total = ref.model(**inputs, labels=labels, num_items_in_batch=2 * count).loss
    assert total.item() == pytest.approx(mean.item() / 2, rel=1e-5)


@torch.no_grad()
def test_logits_to_keep(reference) -> None:
    ref = reference("qwen2_tied")
    inputs = ref.inputs("single0")
    whole = ref.model(**inputs).logits
    assert ref.model(**inputs, logits_to_keep=1).logits.shape == (1, 1, 512)
    assert relative_error(ref.model(**inputs, logits_to_keep=3).logits, whole[:, -3:]) < 1e-6
    chosen = torch.tensor([0, 5])
    assert relative_error(ref.model(**inputs, logits_to_keep=chosen).logits, whole[:, chosen]) < 1e-6


@torch.no_grad()
def test_embeddings_in_place_of_ids(reference) -> None:
    ref = reference("qwen2_tied")
    inputs = ref.inputs("single0")
    expected = ref.model(**inputs).logits
    embeds = ref.model.get_input_embeddings()(inputs["input_ids"])
    got = ref.model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"]).logits
    assert relative_error(got, expected) < 1e-6
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        ref.model(inputs_embeds=embeds, **inputs)
    with pytest.raises(ValueError, match="exactly one"):
        ref.model(pixel_values=inputs["pixel_values"])


@torch.no_grad()
def test_encoded_images_in_place_of_pixels(reference) -> None:
    ref = reference("qwen2_tied")
    inputs = ref.inputs("two_images")
    expected = ref.model(**inputs).logits
    images = ref.model.get_image_features(inputs["pixel_values"])
    got = ref.model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": images})
    assert relative_error(got.logits, expected) < 1e-6
    assert got.image_hidden_states is images.pooler_output
    with pytest.raises(ValueError, match="only one of pixel_values and mm_encoder_outputs"):
        ref.model(**inputs, mm_encoder_outputs={"image": images})


@torch.no_grad()
def test_tuples_hidden_states_and_attentions(reference) -> None:
    ref = reference("qwen2_tied")
    inputs = ref.inputs("single0")
    whole = ref.model(**inputs, return_dict=False)
    assert isinstance(whole, tuple) and whole[0].shape == (1, 46, 512)
    model = AutoModelForImageTextToText.from_pretrained(ref.directory, attn_implementation="eager")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(1, 46, 64)] * 4
    assert [tuple(a.shape) for a in outputs.attentions] == [(1, 4, 46, 46)] * 3
    assert relative_error(outputs.logits, whole[0]) < 1e-5
    images = model.get_image_features(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert len(images.hidden_states) == 5 and len(images.attentions) == 2
    assert isinstance(model.get_image_features(inputs["pixel_values"], return_dict=False), tuple)


def test_counts_that_differ_are_errors(reference) -> None:
    ref = reference("qwen2_tied")
    inputs = ref.inputs("single0")
    two = torch.cat([inputs["pixel_values"]] * 2)
    with pytest.raises(ValueError, match="16 <image> placeholders, but the images have 32 features"):
        ref.model(input_ids=inputs["input_ids"], pixel_values=two)
    with pytest.raises(ValueError, match="16 <image> placeholders, but there are no images"):
        ref.model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="multiples of 64"):
        ref.model(input_ids=inputs["input_ids"], pixel_values=torch.zeros(1, 3, 250, 256))
    model = FastVLMForConditionalGeneration(ref.model.config)
    model.config.image_token_id = None
    with pytest.raises(ValueError, match=r"image_token_id is None.*processor\.image_token_id"):
        model(**inputs)


def test_anyres_counts_are_checked(reference) -> None:
    ref = reference("qwen2_anyres")
    inputs = ref.inputs("single0")
    images = {key: inputs[key] for key in ("pixel_values", "image_sizes", "num_tiles")}
    with pytest.raises(ValueError, match="num_tiles adds up to"):
        ref.model.get_image_features(**(images | {"num_tiles": images["num_tiles"] - 1}))
    with pytest.raises(ValueError, match="image_sizes is needed"):
        ref.model.get_image_features(images["pixel_values"], num_tiles=images["num_tiles"])
    with pytest.raises(ValueError, match="num_tiles is needed"):
        ref.model.get_image_features(images["pixel_values"], image_sizes=images["image_sizes"])
    three = {"pixel_values": images["pixel_values"][:3], "num_tiles": torch.tensor([3])}
    with pytest.raises(ValueError, match="image_grid_pinpoints cuts it into"):
        ref.model.get_image_features(**three, image_sizes=torch.tensor([[600, 600]]))


def test_placeholder_beyond_the_embeddings(checkpoint, tmp_path: Path, reference) -> None:
    """Vicuna's embeddings have no row for <image>, so the placeholder's id must not matter."""
    ref = reference("llama")
    inputs = ref.inputs("single0")
    expected = ref.model(**inputs).logits
    model = FastVLMForConditionalGeneration.from_pretrained(ref.directory)
    model.config.image_token_id = 512  # one more than the last row
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == 483, 512)
    with torch.no_grad():
        assert relative_error(model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits, expected) < 1e-6
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="has no embedding"):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])


def changed(source: Path, target: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """Copy a checkpoint with other tensors or configuration values."""
    shutil.copytree(source, target)
    if tensors is not None:
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def test_tensors_and_not_flags_decide_whether_the_head_is_tied(checkpoint, tmp_path: Path, capsys) -> None:
    tied, untied = checkpoint("qwen2_tied"), checkpoint("qwen2_untied")
    tensors = load_file(tied / "model.safetensors")
    assert "lm_head.weight" in tensors  # stored although tied, as Apple's 0.5B seems to
    without_head = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    cases = {
        "flag wrong, head equal": (tied, tensors, False),
        "flag right, head missing": (tied, without_head, True),
        "flag wrong, head missing": (tied, without_head, False),
    }
    for index, (source, values, flag) in enumerate(cases.values()):
        model = FastVLMForConditionalGeneration.from_pretrained(
            changed(source, tmp_path / str(index), values, tie_word_embeddings=flag)
        )
        assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])
        if "lm_head.weight" not in values:
            assert model.lm_head.weight is model.get_input_embeddings().weight
            assert model.config.tie_word_embeddings is True
    values = load_file(untied / "model.safetensors")
    model = FastVLMForConditionalGeneration.from_pretrained(
        changed(untied, tmp_path / "untied", values, tie_word_embeddings=True)
    )
    assert torch.equal(model.lm_head.weight, values["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, values["model.embed_tokens.weight"])
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "saved")
    again = FastVLMForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, values["lm_head.weight"])
    assert "tied weights mapping" not in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_saved_model_has_apples_names_and_every_tensor(name: str, checkpoint, tmp_path: Path, reference) -> None:
    ref = reference(name)
    ref.model.save_pretrained(tmp_path / "apple")
    original = load_file(checkpoint(name) / "model.safetensors")
    saved = load_file(tmp_path / "apple" / "model.safetensors")
    if name == "qwen2_tied" or name == "qwen2_anyres":
        original.pop("lm_head.weight", None)  # tied tensors are written once
        saved.pop("lm_head.weight", None)
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)
    ref.model.save_pretrained(tmp_path / "ours", save_original_format=False)
    assert "model.multi_modal_projector.linear_1.weight" in load_file(tmp_path / "ours" / "model.safetensors")
    for directory in ("apple", "ours"):
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / directory)
        expected = ref.model.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
        assert again.config.image_token_id == ref.model.config.image_token_id


def test_saving_in_shards(checkpoint, tmp_path: Path, reference) -> None:
    ref = reference("qwen2_untied")
    ref.model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    expected = ref.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


def test_base_model_loads_by_itself(reference) -> None:
    ref = reference("qwen2_untied")
    base, info = AutoModel.from_pretrained(ref.directory, output_loading_info=True)
    assert type(base) is FastVLMModel
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = ref.inputs("single0")
    with torch.no_grad():
        assert relative_error(ref.model.lm_head(base(**inputs).last_hidden_state), ref.model(**inputs).logits) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, reference) -> None:
    ref = reference("qwen2_untied")
    model = FastVLMForConditionalGeneration.from_pretrained(ref.directory, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    inputs = ref.inputs("single0")
    assert relative_error(model(**inputs).logits, ref.model(**inputs).logits) < 5e-2


def test_device_map_and_disk_offload(reference, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    ref = reference("qwen2_untied")
    inputs = ref.inputs("single0")
    with torch.no_grad():
        expected = ref.model(**inputs).logits
        auto = FastVLMForConditionalGeneration.from_pretrained(ref.directory, device_map="cpu")
        assert relative_error(auto(**inputs).logits, expected) < 1e-6
        device_map = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu"}
        device_map |= {"model.language_model": "cpu", "lm_head": "cpu"}
        for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 5e-2)):
            offloaded = FastVLMForConditionalGeneration.from_pretrained(
                ref.directory, device_map=device_map, offload_folder=str(tmp_path / str(dtype)), dtype=dtype
            )
            assert relative_error(offloaded(**inputs).logits, expected) < limit


def test_meta_device() -> None:
    config = FastVLMConfig.from_preset("7b")
    with torch.device("meta"):
        model = FastVLMForConditionalGeneration(config)
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_running_on_the_meta_device(dtype: torch.dtype, train: bool, checkpoint) -> None:
    """On the meta device only shapes and dtypes exist: nothing may query values or autocast there."""
    config = FastVLMConfig.from_pretrained(checkpoint("qwen2_tied"))
    with torch.device("meta"):
        model = FastVLMForConditionalGeneration._from_config(config, dtype=dtype).train(train)
        ids, pixels = torch.zeros(2, 20, dtype=torch.long), torch.empty(2, 3, 256, 256, dtype=dtype)
    with torch.set_grad_enabled(train):
        found = model(input_ids=ids, pixel_values=pixels, labels=ids if train else None)
        text = model(input_ids=ids).logits
    for logits in (found.logits, text):
        assert (logits.shape, logits.dtype, logits.device.type) == ((2, 20, 512), dtype, "meta")
    assert found.image_hidden_states.shape == (2, 16, config.text_config.hidden_size)
    if train:
        found.loss.backward()
        assert all(p.grad is not None and p.grad.is_meta for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "llama", "mistral"])
def test_any_language_model(text: str, tmp_path: Path) -> None:
    config = FastVLMConfig(
        vision_config={"depths": [1] * 5, "hidden_sizes": [8, 16, 32, 32, 32], "image_size": 64, "projection_dim": 0},
        text_config={
            "model_type": text,
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_id=63,
    )
    torch.manual_seed(0)
    model = FastVLMForConditionalGeneration(config).eval()
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter)  # as in a trained model, images affect words as much as words do
    ids, pixels = torch.tensor([[5, 63, 6, 7]]), random_pixels(1, 64, 64)
    alone = AutoModelForCausalLM.from_config(config.text_config).eval()
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        embeddings[:, 1] = model.get_image_features(pixels).pooler_output[0]
        expected = alone(inputs_embeds=embeddings).logits
        logits = model(input_ids=ids, pixel_values=pixels).logits
        without = alone(input_ids=ids).logits
    assert relative_error(logits, expected) < 1e-5
    assert relative_error(without[:, 1:], logits[:, 1:]) > 1e-2  # the image has an effect
    ways = [
        {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "use_cache": cache} for cache in (True, False)
    ]
    tokens = [model.generate(input_ids=ids, pixel_values=pixels, **way).tolist() for way in ways]
    assert tokens[0] == tokens[1] and tokens[0][0][4] == int(expected[0, -1].argmax())
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again.model.language_model) is type(model.model.language_model)
    with torch.no_grad():
        assert relative_error(again(input_ids=ids, pixel_values=pixels).logits, logits) < 1e-5


def test_tensor_parallel_plan_names_real_modules(reference) -> None:
    from transformers_fastvlm.modeling_fastvlm import FastVLMForConditionalGeneration as Model

    model = Model(AutoConfig.from_pretrained(reference("qwen2_untied").directory))
    plan = model.tp_plan
    assert plan["lm_head"] == "colwise_gather_output"
    assert any(name.endswith("q_proj") for name in plan)
    modules = dict(model.named_modules())
    for name in plan:
        concrete = name.replace("*", "0")
        assert concrete in modules or any(m.endswith(concrete) for m in modules), name
