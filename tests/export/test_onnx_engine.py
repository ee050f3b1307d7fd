# SPDX-License-Identifier: Apache-2.0
"""`OnnxEngine`: several images, sampling, stops, and what it refuses."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the export to ONNX is an extra")
pytest.importorskip("onnxruntime", reason="the export to ONNX is an extra")
pytest.importorskip("onnxscript", reason="the export to ONNX is an extra")

from onnx_cases import conversation, scenes, tiny_export, tiny_model  # noqa: E402

from schema_cases import SCHEMAS  # noqa: E402
from transformers_fastvlm.engines import (  # noqa: E402
    OnnxEngine,
    Sampling,
    TransformersEngine,
    load_engine,
    onnx_sessions,
)


@pytest.fixture(scope="module")
def engine() -> OnnxEngine:
    return load_engine("onnx", tiny_export().directory, precision="float32")


@torch.no_grad()
def test_two_images_and_none(engine: OnnxEngine) -> None:
    model, processor = tiny_model()
    (first, question, _), (second, _, _) = scenes(2)
    both = conversation(first, question)
    both[0]["content"].insert(1, {"type": "image", "image": second})
    alone = [{"role": "user", "content": "What is the colour?"}]
    answers = engine.generate([both, alone], Sampling(max_new_tokens=8))
    for messages, answer in zip((both, alone), answers, strict=True):
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert answer.text == processor.tokenizer.decode(output, skip_special_tokens=True).strip()


def test_sampling_is_repeatable_and_differs_between_seeds(engine: OnnxEngine) -> None:
    picture = scenes(1)[0][0]

    def ask(seed: int) -> str:
        sampling = Sampling(max_new_tokens=24, temperature=2.0, seed=seed)
        return engine.generate([conversation(picture, "Describe the image.")], sampling)[0].text

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_a_small_top_p_is_greedy(engine: OnnxEngine) -> None:
    picture, question, _ = scenes(1)[0]
    greedy = engine.generate([conversation(picture, question)], Sampling(max_new_tokens=8))
    sampled = engine.generate([conversation(picture, question)], Sampling(max_new_tokens=8, temperature=1, top_p=1e-6))
    assert sampled == greedy


def test_length_and_stop(engine: OnnxEngine) -> None:
    picture, question, _ = scenes(1)[0]
    whole = engine.generate([conversation(picture, question)], Sampling())[0]
    assert whole.finish_reason == "stop" and len(whole.text) > 1
    cut = engine.generate([conversation(picture, question)], Sampling(max_new_tokens=1))[0]
    assert (cut.finish_reason, cut.completion_tokens) == ("length", 1)
    stopped = engine.generate([conversation(picture, question)], Sampling(stop=(whole.text[1:],)))[0]
    assert (stopped.finish_reason, stopped.text) == ("stop", whole.text[:1].strip())


def test_a_directory_without_the_number_of_logits(engine: OnnxEngine, tmp_path: Path) -> None:
    """As earlier versions wrote them: all logits are computed."""
    old = Path(shutil.copytree(tiny_export().directory, tmp_path / "old"))
    for file in (old / "onnx").glob("decoder_model_merged*.onnx"):
        model = onnx.load(file)
        model.graph.input.remove(next(value for value in model.graph.input if value.name == "num_logits_to_keep"))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "num_logits_to_keep"))
        onnx.save(model, file)
    questions = [conversation(picture, question) for picture, question, _ in scenes(2)]
    expected = engine.generate(questions, Sampling(max_new_tokens=8))
    assert load_engine("onnx", old, precision="float32").generate(questions, Sampling(max_new_tokens=8)) == expected


def test_keys_and_values_that_stay_in_the_runtime(engine: OnnxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, here in the CPU's memory."""
    questions = [conversation(picture, question) for picture, question, _ in scenes(2)]
    expected = engine.generate(questions, Sampling(max_new_tokens=8))
    monkeypatch.setitem(onnx_sessions._MEMORY_OF, "CPUExecutionProvider", "cpu")
    assert engine.generate(questions, Sampling(max_new_tokens=8)) == expected
    _, past = engine.model.decode(engine.model.embeddings(np.array([[5, 6]])), np.ones((1, 2)))
    assert {type(value).__name__ for value in past.values()} == {"OrtValue"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_follow_a_schema(engine: OnnxEngine, name: str) -> None:
    pytest.importorskip("llguidance", reason="answers that follow a schema need llguidance, of the extra schema")
    schema, fits = SCHEMAS[name]
    questions = [conversation(picture, question) for picture, question, _ in scenes(3)]
    sampling = Sampling(max_new_tokens=160, temperature=1.5, seed=1, schema=schema)
    for answer in [
        *engine.generate(questions, sampling),
        *engine.generate(questions, replace(sampling, temperature=0)),
    ]:
        assert answer.finish_reason == "stop" and fits(answer.text), answer.text


def test_biases_penalties_and_logprobs_are_those_of_pytorch(engine: OnnxEngine) -> None:
    picture, question, _ = scenes(1)[0]
    other = TransformersEngine(*tiny_model())
    for sampling in (
        Sampling(max_new_tokens=8, logprobs=2),
        Sampling(max_new_tokens=8, logit_bias=((40, 5.0),), frequency_penalty=1.5, presence_penalty=1.0),
    ):
        (found,), (expected,) = (one.generate([conversation(picture, question)], sampling) for one in (engine, other))
        assert found == expected
        for noted, right in zip(found.logprobs or (), expected.logprobs or (), strict=True):
            assert (noted.token, noted.text) == (right.token, right.text)
            assert noted.logprob == pytest.approx(right.logprob, abs=1e-3)
    other.close()


def test_what_is_refused(engine: OnnxEngine, tmp_path: Path) -> None:
    picture, question, _ = scenes(1)[0]
    with pytest.raises(ValueError, match="<image>"):
        engine.generate([[{"role": "user", "content": "<image>\nWhat?"}]], Sampling())
    with pytest.raises(ValueError, match="fills the model's context"):
        engine.generate([conversation(picture, question * 400)], Sampling())
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        engine.generate([conversation(picture, question)], Sampling(max_new_tokens=0))
    with pytest.raises(FileNotFoundError, match="'int3'; it has float32, float16, q8, q4, q4f16"):
        OnnxEngine(tiny_export().directory, "int3")
    with pytest.raises(FileNotFoundError, match="it has none"):
        OnnxEngine(tmp_path)
