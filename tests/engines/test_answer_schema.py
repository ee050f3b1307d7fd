# SPDX-License-Identifier: Apache-2.0
"""Options of an answer that need no optional package: schemas as values, biases, penalties and logprobs."""

import sys
from typing import Any

import pytest
import torch
from engine_cases import QUESTION, ask

from transformers_fastvlm import compat
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.engines import Sampling, Schema, TransformersEngine
from transformers_fastvlm.engines.row_sampling import RowChooser, choose_tokens


@pytest.fixture(scope="module")
def engine():
    engine = TransformersEngine(str(tiny_checkpoint()), dtype="float32", device="cpu", batch_size=8)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Schema.json("{"), "not JSON: Expecting property name"),
        (lambda: Schema.json({"minimum": float("nan")}), "not JSON: Out of range float values"),
        (lambda: Schema.json({"enum": [object()]}), "not JSON"),
        (lambda: Schema.json("[" * 100_000), "nested too deeply"),
        (lambda: Schema.json("[1, 2]"), r"is \[1, 2\]; expected an object"),
        (lambda: Schema.json(False), "is false; expected an object"),
        (lambda: Schema.json({"description": "x" * 70_000}), "bytes; expected at most 65,536"),
        (lambda: Schema.json({"const": "\ud800"}), "lone surrogates"),
        (lambda: Schema.regex(""), "regular expression is empty"),
        (lambda: Schema.choices([]), "a list of 1 to 1,000 texts"),
        (lambda: Schema.choices("abc"), "a list of 1 to 1,000 texts"),
        (lambda: Schema.choices([""]), "a choice is ''"),
        (lambda: Schema.choices(["a", " b"]), "a choice is ' b'"),
        (lambda: Schema.choices(["a\nb"]), "a choice is"),
        (lambda: Schema.choices(["a", "b", "a"]), "'a' is given twice"),
        (lambda: Sampling(schema={"type": "object"}), r"schema is a dict; expected Schema\.json"),  # type: ignore[arg-type]
        (lambda: Sampling(schema=Schema.json_object(), stop=("}",)), "stop and schema"),
        (lambda: Sampling(num_beams=2, schema=Schema.json_object()), "beam search does not support schema"),
        (lambda: Sampling(num_beams=2, logprobs=1), "beam search does not support schema"),
        (lambda: Sampling(presence_penalty=2.5), "presence_penalty is 2.5; expected a number from -2 to 2"),
        (lambda: Sampling(frequency_penalty=float("nan")), "frequency_penalty is nan"),
        (lambda: Sampling(logprobs=21), "logprobs is 21; expected a whole number from 0 to 20"),
        (lambda: Sampling(logit_bias=((3, 101.0),)), "logit_bias of token 3 is 101"),
        (lambda: Sampling(logit_bias=tuple((token, 1.0) for token in range(1025))), "1,025 tokens"),
    ],
)
def test_refuses(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_a_schema_keeps_the_order_of_its_fields_and_samplings_stay_hashable() -> None:
    schema = Schema.json('{"properties": {"b": {"type": "string"}, "a": {}}}')
    assert list(schema.value["properties"]) == ["b", "a"]
    assert len({Sampling(schema=schema), Sampling(schema=Schema.json(schema.value)), Sampling()}) == 2
    assert Schema.json(True).value == {}


def test_a_schema_without_its_package(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(engine, "_grammars", None)
    message = r'An answer that follows a schema needs llguidance: pip install "transformers-fastvlm\[schema\]"'
    with pytest.raises(ImportError, match=message):
        engine.generate([ask("Hi")], Sampling(schema=Schema.json_object()))


def test_a_bias_for_a_token_that_the_model_lacks(engine) -> None:
    with pytest.raises(ValueError, match="logit_bias has token 512; expected a token id from 0 to 511"):
        engine.generate([ask("Hi")], Sampling(logit_bias=((512, 1.0),)))


def test_biases_and_penalties_are_those_of_openai() -> None:
    """score - presence * (token was there) - frequency * (times it was there) + bias."""
    scores = torch.tensor([[3.0, 2.9, 2.0, 0.0]])

    def chosen(**options: Any) -> list[int]:
        chooser = RowChooser(Sampling(**options))
        return [choose_tokens([chooser], scores)[0] for _ in range(5)]

    assert chosen() == [0, 0, 0, 0, 0]
    assert chosen(presence_penalty=0.5) == [0, 1, 0, 0, 0]
    assert chosen(presence_penalty=2.0) == [0, 1, 2, 0, 0]
    assert chosen(frequency_penalty=0.4) == [0, 1, 0, 1, 0]
    assert chosen(frequency_penalty=-1.0, logit_bias=((1, 0.2),)) == [1, 1, 1, 1, 1]
    assert chosen(logit_bias=((3, 100.0), (0, -100.0))) == [3, 3, 3, 3, 3]
    assert chosen(logit_bias=((0, -100.0),), presence_penalty=1.0) == [1, 2, 1, 1, 1]


def test_logprobs_are_of_the_scores_as_they_are() -> None:
    scores = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    expected = scores[0].log_softmax(-1)
    asking = RowChooser(Sampling(temperature=2.0, seed=1, logprobs=3, logit_bias=((4, 50.0),)))
    silent = RowChooser(Sampling())
    token = choose_tokens([asking, silent], scores)[0]
    assert token == 4 and silent.logprobs is None and asking.logprobs is not None
    own, top = asking.logprobs
    assert own == pytest.approx(float(expected[4]))
    values, ids = expected.topk(3)
    assert [one for one, _ in top] == ids.tolist()
    assert [value for _, value in top] == pytest.approx(values.tolist())


def test_logprobs_of_an_answer_equal_those_of_the_model(engine, images) -> None:
    conversation = ask(QUESTION, images[0])
    answer, other = engine.generate(
        [conversation, ask("Hi")], [Sampling(max_new_tokens=6, logprobs=2), Sampling(max_new_tokens=9)]
    )
    assert other.logprobs is None
    assert answer.logprobs is not None and len(answer.logprobs) == answer.completion_tokens
    inputs = engine.processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    options = {"do_sample": False, "max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    with compat.plain_attention(engine.model):
        output = engine.model.generate(**inputs, **options)
    for noted, logits in zip(answer.logprobs, output.logits, strict=True):
        expected = logits[0].float().log_softmax(-1)
        values, ids = expected.topk(2)
        assert noted.token == int(ids[0])
        assert noted.logprob == pytest.approx(float(values[0]), abs=1e-4)
        assert [one.token for one in noted.top] == ids.tolist()
        assert [one.logprob for one in noted.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert noted.text == engine.processor.tokenizer.decode([noted.token])
    text = "".join(one.text for one in answer.logprobs if one.token not in engine._ends())
    assert text.strip() == answer.text


def test_rows_with_options_beside_rows_without(engine, mixed) -> None:
    samplings = [
        Sampling(max_new_tokens=8),
        Sampling(max_new_tokens=8, frequency_penalty=1.5, presence_penalty=0.5),
        Sampling(max_new_tokens=8, logit_bias=((40, 100.0),)),
        Sampling(max_new_tokens=8, temperature=1.0, seed=4, logprobs=0),
        Sampling(max_new_tokens=8, temperature=1.0, seed=4, frequency_penalty=2.0),
    ]
    together = engine.generate(mixed[: len(samplings)], samplings)
    alone = [engine.generate([one], sampling)[0] for one, sampling in zip(mixed, samplings, strict=False)]
    assert together == alone
    assert set(together[2].text) == {engine.processor.tokenizer.decode([40]).strip()}
