# SPDX-License-Identifier: Apache-2.0
"""The engine over Transformers: answers of rows together beside those of each alone, options, and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import QUESTION, ask, plain
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from helpers import relative_error
from transformers_fastvlm import compat
from transformers_fastvlm.engines import (
    ENGINES,
    Engine,
    LlamaCppEngine,
    OnnxEngine,
    Sampling,
    TransformersEngine,
    VllmEngine,
    load_engine,
)
from transformers_fastvlm.engines.continuous_rows import ContinuousRows
from transformers_fastvlm.inference.image_table import FIRST_ID

SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def model(checkpoint) -> Path:
    return checkpoint("qwen2_untied")


@pytest.fixture(scope="module")
def engine(model) -> TransformersEngine:
    engine = load_engine("transformers", str(model), dtype="float32", device="cpu", batch_size=3)
    assert isinstance(engine, TransformersEngine)
    return engine


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen2_anyres", "llama"])
def test_each_row_as_when_it_is_asked_alone(checkpoint, mixed, name: str) -> None:
    engine = TransformersEngine(str(checkpoint(name)), dtype="float32", device="cpu", batch_size=3)
    answers = engine.generate(mixed, SHORT)
    found = [(answer.text, answer.prompt_tokens, answer.completion_tokens) for answer in answers]
    assert found == [plain(engine, conversation, 8) for conversation in mixed]
    images = [sum(part["type"] == "image" for part in conversation[-1]["content"]) for conversation in mixed]
    assert [answer.image_tokens > 0 for answer in answers] == [number > 0 for number in images]
    assert {answer.finish_reason for answer in answers if answer.completion_tokens < 8} <= {"stop"}
    engine.close()


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen2_anyres", "llama"])
def test_inputs_are_those_of_the_processor(checkpoint, mixed, name: str) -> None:
    engine = TransformersEngine(str(checkpoint(name)), dtype="float32", device="cpu")
    control = ask("Say <image>, then <|im_end|>.", Image.new("RGB", (90, 30)))
    for conversation in [*mixed, control]:
        literal = conversation is control
        options = {"sanitize_control_tokens": True} if literal and compat.SANITIZES_CONTROL_TOKENS else {}
        if literal and not options:
            continue
        expected = engine.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        prompt = engine.prepare(conversation, literal=literal)
        stored = prompt.inputs["images"]
        kind = stored[0].kind if stored else ()
        tables = {one: [image.inputs[one] for image in stored] for one in kind}
        ids = torch.tensor([prompt.inputs["ids"]])
        placeholders = ids.masked_fill(ids >= FIRST_ID, engine.model.config.image_token_id)
        assert torch.equal(placeholders, expected["input_ids"])
        assert set(tables) | {"input_ids", "attention_mask"} == expected.keys()
        assert all(torch.equal(torch.cat(parts), expected[key]) for key, parts in tables.items())
        assert prompt.tokens == expected["input_ids"].shape[1] and prompt.images == []


def test_longest_first(engine, mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an out-of-memory error appears at once."""
    begun: list[int] = []
    add = ContinuousRows.add
    monkeypatch.setattr(ContinuousRows, "add", lambda self, one: (begun.append(one.prompt.tokens), add(self, one))[1])
    engine.generate(mixed, SHORT)
    assert begun == sorted(begun, reverse=True) and len(begun) == len(mixed)


def test_ends_where_a_text_says(engine, images) -> None:
    conversations = [ask(QUESTION, images[0]), ask("Hi"), ask(QUESTION, images[1])]
    whole = engine.generate(conversations, Sampling(max_new_tokens=24))
    stop = whole[0].text[4:6]
    ended = engine.generate(conversations, Sampling(max_new_tokens=24, stop=(stop, "\0never")))
    for before, after in zip(whole, ended, strict=True):
        at = before.text.find(stop)
        assert after.text == (before.text if at < 0 else before.text[:at]).strip()
        if at >= 0:
            assert after.finish_reason == "stop" and after.completion_tokens <= before.completion_tokens
    assert ended[0].completion_tokens < whole[0].completion_tokens


def test_an_answer_ends_with_the_context_of_its_own_row(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = ask("Read the text. " * 9), ask("Hi")
    alone = engine.generate([short], SHORT)
    tokens = engine.generate([long], Sampling(max_new_tokens=1))[0].prompt_tokens
    monkeypatch.setattr(engine.processor, "context_length", tokens + 2)
    cut, whole = engine.generate([long, short], SHORT)
    assert cut.completion_tokens <= 2 and [whole] == alone
    monkeypatch.setattr(engine.processor, "context_length", tokens)
    with pytest.raises(ValueError, match=f"has {tokens} tokens and fills the model's context of {tokens}"):
        engine.generate([long], SHORT)


def test_refuses_before_the_model_runs(engine, images, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(**_: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(engine.model, "generate", never)
    images[0].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    good = ask(QUESTION, images[0])
    with Image.open(tmp_path / "cut.png") as cut:
        bad = {
            "1 placeholders": ask("What is <image>?"),
            "2 placeholders": ask("What is <image>?", images[0]),
            "not UTF-8": ask("What\udcff?"),
            "truncated": ask(QUESTION, cut),
            "values from": ask(QUESTION, Image.new("F", (8, 8), 7.0)),
            "expected type text": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}],
        }
        for message, conversation in bad.items():
            with pytest.raises(ValueError, match=f"^Conversation 1: .*{message}"):
                engine.generate([good, conversation], SHORT)
    assert engine.generate([], SHORT) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", 2.5),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("seed", -1),
        ("seed", 2**64),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("stop", ("",)),
        ("num_beams", 0),
    ],
)
def test_refuses_sampling(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        Sampling(**{name: value})


def test_a_temperature_near_0_is_greedy(engine) -> None:
    greedy, cold = (
        engine.generate([ask(QUESTION)], Sampling(max_new_tokens=8, temperature=temperature, seed=2**64 - 1))
        for temperature in (0.0, 1e-45)
    )
    assert greedy == cold


def test_loads_as_it_is_told(model, tmp_path) -> None:
    half = tmp_path / "half"
    shutil.copytree(model, half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    engine = TransformersEngine(str(half), device="cpu", size=512)
    assert engine.model.dtype == torch.float32
    answer = engine.generate([ask(QUESTION, Image.new("RGB", (64, 48)))], SHORT)[0]
    tokens = len(AutoTokenizer.from_pretrained(model)(QUESTION).input_ids)
    assert answer.prompt_tokens > 64 + tokens
    engine.close()
    assert engine.model is None
    assert TransformersEngine(str(half), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of auto, float32"),
        ({"device": "abacus"}, "device is 'abacus', which torch does not know"),
        ({"device": "cpu", "batch_size": 0}, "batch_size is 0; expected 1 or more"),
    ],
)
def test_refuses_options(model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_engine("transformers", str(model), **options)


def test_names() -> None:
    with pytest.raises(ValueError, match=r"engine is 'tensorrt'; expected one of transformers, vllm, onnx, llamacpp\."):
        load_engine("tensorrt", "tiny")
    assert ENGINES == ("transformers", "vllm", "onnx", "llamacpp")
    for kind in (TransformersEngine, OnnxEngine, VllmEngine, LlamaCppEngine):
        assert issubclass(kind, Engine)
        assert {"device", "dtype", "_ends"} <= vars(kind).keys()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_loaded_with_its_base(model: Path, tmp_path: Path, image: Image.Image) -> None:
    """The directory that training with LoRA leaves answers as the merged model does, on the command line too."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    base = AutoModelForImageTextToText.from_pretrained(model)
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    content = ask(QUESTION, image)
    before = load_engine("transformers", str(model), device="cpu").generate([content], SHORT)
    engine: Any = load_engine("transformers", str(tmp_path / "adapter"), device="cpu")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert relative_error(engine.model(ids).logits, adapted.eval()(input_ids=ids).logits) < 1e-5
    assert engine.generate([content], SHORT)[0].text != before[0].text
    assert not any("lora" in name for name, _ in engine.model.named_parameters())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"peft_type": "LORA"}, "names no base model"),
        ({"peft_type": "LORA", "base_model_name_or_path": "/nowhere/at/all"}, "'/nowhere/at/all' does not exist"),
        (None, "adapter of LLaVA code"),
    ],
)
def test_an_adapter_without_its_base(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(content or {"base_model_name_or_path": "x"}))
    if content is None:
        (tmp_path / "non_lora_trainables.bin").touch()
    with pytest.raises(ValueError, match=f"is an adapter.*{message}|{message}.*") as error:
        load_engine("transformers", str(tmp_path), device="cpu")
    assert f"fastvlm merge {tmp_path} OUT --base BASE" in str(error.value)
