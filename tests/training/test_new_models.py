# SPDX-License-Identifier: Apache-2.0
"""New models: an encoder and a language model put together, saved, and loaded by every road."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from transformers_fastvlm import FastViTHDConfig, FastViTHDModel, FastVLMForConditionalGeneration
from transformers_fastvlm.checkpoints import convert
from transformers_fastvlm.training import new_model, save_model

ENCODER = {"depths": [1] * 5, "hidden_sizes": [8, 16, 32, 64, 128], "projection_dim": 0, "image_size": 128}
DECODER = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def language_model(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a language model of a kind, with its tokenizer, as one would find it on the hub."""
    root = tmp_path_factory.mktemp("language-models")

    def get(kind: str, rows: int = 512, tied: bool = True) -> Path:
        out = root / f"{kind}-{rows}-{tied}"
        if not out.exists():
            fields = {**DECODER, "vocab_size": rows, "tie_word_embeddings": tied, "eos_token_id": 480}
            del fields["model_type"]
            if kind == "qwen3":
                fields["head_dim"] = 32
            config = AutoConfig.for_model(kind, **fields)
            torch.manual_seed(1)
            AutoModelForCausalLM.from_config(config).save_pretrained(out)
            for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
                shutil.copy(checkpoint("qwen2_tied") / file, out)
        return out

    return get


def question(processor: Any) -> Any:
    content = [{"type": "image", "image": Image.new("RGB", (90, 50), "red")}, {"type": "text", "text": "What is it?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def same_state(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("kind", "tied"), [("qwen2", True), ("qwen3", False), ("llama", False)])
def test_parts_arrive_and_the_auto_classes_load_the_result(
    kind: str, tied: bool, language_model: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = language_model(kind, tied=tied)
    model, processor = new_model(checkpoint("qwen2_untied"), source, image_size=128)
    out = save_model(model, processor, tmp_path / "new")

    encoder = FastViTHDModel.from_pretrained(checkpoint("qwen2_untied"))
    decoder = AutoModelForCausalLM.from_pretrained(source)
    assert same_state(model.model.vision_tower, encoder)
    assert same_state(model.model.language_model, decoder.model)
    assert torch.equal(model.lm_head.weight, decoder.lm_head.weight)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied

    loaded = AutoModelForImageTextToText.from_pretrained(out)
    again = AutoProcessor.from_pretrained(out)
    assert same_state(loaded, model)
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    assert loaded.config.image_token_id == again.image_token_id == processor.image_token_id == 483
    assert again.chat_template == processor.chat_template
    assert again.image_processor.size == {"height": 128, "width": 128}
    inputs = question(again)
    assert int((inputs["input_ids"] == 483).sum()) == 4  # 128 / 64, squared
    answer = loaded.generate(**inputs, max_new_tokens=5)
    assert torch.equal(answer, model.generate(**question(processor), max_new_tokens=5))
    assert loaded.generation_config.eos_token_id == again.tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("reparameterized", [True, False])
@pytest.mark.parametrize("where", ["fields", "configuration", "model", "directory"])
def test_encoders_come_in_either_form_from_anywhere(
    where: str, reparameterized: bool, language_model: Any, tmp_path: Path
) -> None:
    fields = {**ENCODER, "reparameterized": reparameterized}
    torch.manual_seed(3)
    encoder = FastViTHDModel(FastViTHDConfig(**fields))
    encoder.save_pretrained(tmp_path)
    source = {"fields": fields, "configuration": FastViTHDConfig(**fields), "model": encoder, "directory": tmp_path}
    model, _ = new_model(source[where], language_model("qwen2"))
    assert model.config.vision_config.reparameterized is reparameterized
    assert model.config.vision_config.image_size == 128
    if where in ("model", "directory"):
        assert same_state(model.model.vision_tower, encoder)


def test_the_whole_becomes_apples_layout(language_model: Any, tmp_path: Path) -> None:
    model, processor = new_model({**ENCODER, "reparameterized": False}, language_model("qwen2"))
    out = convert(save_model(model, processor, tmp_path / "new"), tmp_path / "apple", "apple").directory
    loaded = AutoModelForImageTextToText.from_pretrained(out)
    again = AutoProcessor.from_pretrained(out)
    assert same_state(loaded, model) and loaded.config.image_token_id == again.image_token_id == 483
    ids = loaded.generate(**question(again), max_new_tokens=5, do_sample=False)
    assert torch.equal(ids, model.generate(**question(processor), max_new_tokens=5))


def test_a_language_model_is_taken_out_of_a_fastvlm(checkpoint: Checkpoint) -> None:
    whole = FastVLMForConditionalGeneration.from_pretrained(checkpoint("llama"))
    model, processor = new_model(ENCODER, checkpoint("llama"))
    assert same_state(model.model.language_model, whole.model.language_model)
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)
    assert "<|im_start|>" in processor.chat_template  # this tokenizer has ChatML's tokens, whatever the model


def test_only_the_projector_is_new_and_follows_the_seed(language_model: Any, checkpoint: Checkpoint) -> None:
    state = torch.random.get_rng_state()
    first, second, other = (
        new_model(checkpoint("qwen2_tied"), language_model("qwen2"), seed=seed)[0].state_dict() for seed in (5, 5, 6)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {f"model.multi_modal_projector.linear_{layer}.weight" for layer in (1, 2)}
    projector = first["model.multi_modal_projector.linear_1.weight"]
    assert 0.015 < projector.std() < 0.025 and not first["model.multi_modal_projector.linear_1.bias"].any()


def test_image_tokens_beyond_the_rows_do_not_grow_them(language_model: Any) -> None:
    model, processor = new_model(ENCODER, language_model("qwen2", rows=483))
    assert processor.image_token_id == 483 == model.get_input_embeddings().weight.shape[0]
    assert model.config.text_config.vocab_size == 483


def words(directory: Path, end: str) -> Path:
    """Write a tokenizer of another family: no ChatML, no padding, texts end with `end`."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, end: 1, "what": 2, "is": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=end)
    fast.save_pretrained(directory)
    return directory


def test_a_llama_whose_texts_end_as_vicunas_talks_as_vicuna(tmp_path: Path) -> None:
    fields = {**DECODER, "model_type": "llama"}
    model, processor = new_model(ENCODER, fields, words(tmp_path, "</s>"))
    assert "ASSISTANT:" in processor.chat_template and processor.image_token_id == 4
    assert model.config.text_config.vocab_size == 4  # nothing but <image> is new, and that has no row
    assert model.generation_config.eos_token_id == 1 and processor.tokenizer.pad_token == "<unk>"


def test_a_tokenizer_without_chatml_gets_it_and_the_model_rows_for_it(tmp_path: Path) -> None:
    fields = {**DECODER, "model_type": "llama", "vocab_size": 4}
    model, processor = new_model(ENCODER, fields, words(tmp_path / "words", "<end>"))
    tokens = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<image>"])
    assert tokens == [4, 5, 6] and model.get_input_embeddings().weight.shape[0] == 6 == model.lm_head.out_features
    assert "<|im_start|>" in processor.chat_template
    assert (processor.tokenizer.eos_token, processor.tokenizer.pad_token) == ("<|im_end|>", "<end>")
    save_model(model, processor, tmp_path / "new")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    loaded.generate(**question(AutoProcessor.from_pretrained(tmp_path / "new")), max_new_tokens=2)


def test_a_vocabulary_left_out_is_the_tokenizers(checkpoint: Checkpoint) -> None:
    model, _ = new_model(ENCODER, DECODER, checkpoint("qwen2_tied"))
    assert model.config.text_config.vocab_size == 483


def test_weights_take_the_type_asked_for(language_model: Any) -> None:
    model, _ = new_model(ENCODER, language_model("qwen2"), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; expected a floating-point dtype"),
        ({"image_size": 100}, "image_size is 100, expected a positive multiple of 64"),
        (
            {"language_model": {"hidden_size": 8}, "tokenizer": ""},
            "model_type None; expected a model_type of",
        ),
        ({"language_model": DECODER}, "has no directory, so its tokenizer is unknown"),
        ({"language_model": AutoConfig.for_model("gpt2")}, "has no directory"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str, language_model: Any) -> None:
    if "tokenizer" in arguments:
        arguments = {**arguments, "tokenizer": language_model("qwen2")}
    with pytest.raises(ValueError, match=message):
        new_model(**{"vision": ENCODER, "language_model": language_model("qwen2"), **arguments})


def test_sources_of_other_kinds_are_refused(language_model: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_type 'qwen2'; expected a FastViTHD"):
        new_model(language_model("qwen2"), language_model("qwen2"))
    native = convert(checkpoint("qwen2_tied"), tmp_path / "native", "native").directory
    with pytest.raises(ValueError, match=r"layout of Transformers' own fast_vlm. Convert it once: fastvlm convert"):
        new_model(native, language_model("qwen2"))
    tokenizer = AutoTokenizer.from_pretrained(language_model("qwen2"))
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=483)
    with pytest.raises(ValueError, match="GPT2LMHeadModel does not consist of `model` and `lm_head`"):
        new_model(ENCODER, config, tokenizer)


def test_nothing_is_overwritten_and_nothing_half_done_stays(language_model: Any, tmp_path: Path) -> None:
    model, processor = new_model(ENCODER, language_model("qwen2"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        save_model(model, processor, tmp_path / "full")
    with pytest.raises(AttributeError):
        save_model(model, None, tmp_path / "new")  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
