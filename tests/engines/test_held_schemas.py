# SPDX-License-Identifier: Apache-2.0
"""Answers follow their schema, whatever the model would say and whatever runs beside them."""

import random
import re
from typing import Any

import pytest
import torch
from engine_cases import ask

from schema_cases import SCHEMAS
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.engines import Sampling, Schema, TransformersEngine
from transformers_fastvlm.engines.grammars import Grammars
from transformers_fastvlm.engines.prompts import place_images
from transformers_fastvlm.engines.row_sampling import RowChooser, choose_tokens

pytest.importorskip("llguidance", reason="llguidance is not installed")

ROOM = 160


@pytest.fixture(scope="module")
def engine():
    engine = TransformersEngine(str(tiny_checkpoint()), dtype="float32", device="cpu", batch_size=16)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def scenes() -> list[list[dict[str, Any]]]:
    """Questions about scenes that the tiny model has not seen."""
    rows = (SceneDataset(12, seed=2026, task="questions")[index] for index in range(12))
    return [[{"role": "user", "content": place_images(row["messages"][0]["content"], row["images"])}] for row in rows]


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_every_answer_fits(engine, scenes, name: str, temperature: float) -> None:
    schema, fits = SCHEMAS[name]
    seed = None if temperature == 0 else 3
    sampling = Sampling(max_new_tokens=ROOM, temperature=temperature, seed=seed, schema=schema)
    answers = engine.generate(scenes, sampling)
    assert [answer.text for answer in answers if answer.finish_reason != "stop" or not fits(answer.text)] == []
    if temperature:
        assert len({answer.text for answer in answers}) > 1


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_model_of_random_scores_is_held_too(engine, name: str) -> None:
    """Text without any meaning: each step has other scores, and end and control tokens are the most probable ones."""
    schema, fits = SCHEMAS[name]
    ends, tokenizer, rows = engine._ends(), engine.processor.tokenizer, 8
    grammars = Grammars(tokenizer, ends, engine._vocabulary())
    samplings = [Sampling(schema=schema), Sampling(temperature=2.0, seed=1, schema=schema)] * (rows // 2)
    choosers = [RowChooser(sampling, grammars.matcher(schema), ends) for sampling in samplings]
    taken: list[list[int]] = [[] for _ in choosers]
    generator = torch.Generator().manual_seed(1)
    for _ in range(2000):
        if all(chooser.ended for chooser in choosers):
            break
        scores = 5 * torch.randn(rows, engine._vocabulary(), generator=generator)
        scores[:, sorted(tokenizer.added_tokens_decoder)] += 30.0
        running = [row for row in range(rows) if not choosers[row].ended]
        for row, token in zip(range(rows), choose_tokens(choosers, scores), strict=True):
            if row in running and token not in ends:
                taken[row].append(token)
    assert all(chooser.ended and chooser.error is None for chooser in choosers)
    texts = [tokenizer.decode(tokens) for tokens in taken]
    assert [text for text in texts if not fits(text)] == []
    assert not set(tokenizer.added_tokens_decoder) & {token for tokens in taken for token in tokens}


def test_rows_with_schemas_beside_rows_without(engine, scenes) -> None:
    kinds = [None, *(schema for schema, _ in SCHEMAS.values())]
    samplings = [
        Sampling(
            max_new_tokens=30,
            temperature=1.5 * (index % 3 > 0),
            seed=index if index % 3 else None,
            schema=kinds[index % len(kinds)],
            frequency_penalty=0.5 * (index % 4 == 0),
        )
        for index in range(len(scenes))
    ]
    together = engine.generate(scenes, samplings)
    alone = [engine.generate([one], sampling)[0] for one, sampling in zip(scenes, samplings, strict=True)]
    assert together == alone
    order = random.Random(0).sample(range(len(scenes)), len(scenes))
    shuffled = engine.generate([scenes[index] for index in order], [samplings[index] for index in order])
    assert shuffled == [alone[index] for index in order]


def test_a_chosen_text_needs_no_end_token_and_counts_as_whole(engine) -> None:
    """Nothing can follow the last letter, so the answer ends there, also where its limit is."""
    schema = Schema.regex("[0-9]{3}")
    free, tight = engine.generate([ask("Hi")] * 2, [Sampling(max_new_tokens=n, schema=schema) for n in (50, 3)])
    assert free == tight
    assert (free.finish_reason, free.completion_tokens) == ("stop", 3)


@pytest.mark.parametrize("schema", [Schema.regex("[0-9]{5}"), Schema.json({"type": "array", "minItems": 5})])
def test_an_answer_that_is_cut_says_so(engine, schema: Schema) -> None:
    (answer,) = engine.generate([ask("Hi")], Sampling(max_new_tokens=4, schema=schema))
    assert answer.finish_reason == "length"


def test_any_object(engine) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=1.0, seed=1, schema=Schema.json_object())
    for answer in engine.generate([ask("Hi")] * 4, sampling):
        assert answer.text.startswith("{")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (Schema.json({"type": "nope"}), "JSON schema is not supported: Invalid type: nope."),
        (Schema.json({"not": {"type": "string"}}), 'JSON schema is not supported: Unimplemented keys: ["not"].'),
        (Schema.json({"type": "object", "x-guidance": {"lenient": True}, "not": {}}), 'keys: ["not"].'),
        (Schema.json({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (Schema.json({"$ref": "http://127.0.0.1:9/schema.json"}), "Default retriever does not fetch resources."),
        (Schema.json({"$ref": "file:///etc/passwd"}), "Default retriever does not fetch resources."),
        (Schema.json({"$ref": "#"}), "JSON schema is not supported: no text follows it."),
        (Schema.json({"enum": []}), "Unsatisfiable schema"),
        (Schema.json({"type": "integer", "minimum": 3, "maximum": 2}), "Unsatisfiable schema"),
        (Schema.json('{"items":' * 200 + "{}" + "}" * 200), "recursion limit exceeded"),
        (Schema.json({"properties": {str(number): {} for number in range(4500)}}), "too big"),
        (Schema.regex("("), "regular expression is not supported: at 1(8): invalid regex"),
        (Schema.regex(r"(a)\1"), "backreferences are not supported"),
    ],
)
def test_a_schema_that_cannot_be_held(engine, schema: Schema, said: str) -> None:
    for _ in range(2):  # a schema that failed is not remembered as a good one
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            engine.stream(ask("Hi"), Sampling(schema=schema))
        assert "\n" not in str(caught.value)


def test_a_row_that_cannot_go_on_fails_alone(engine) -> None:
    """Scores that are not numbers choose a token that the schema does not allow."""
    schema = Schema.regex("[0-9]{3}")
    grammars = Grammars(engine.processor.tokenizer, engine._ends(), engine._vocabulary())
    samplings = (Sampling(temperature=1.0, schema=schema), Sampling(schema=schema))
    bad, good = (RowChooser(sampling, grammars.matcher(schema), engine._ends()) for sampling in samplings)
    scores = torch.zeros(2, engine._vocabulary())
    scores[0] = float("nan")
    choose_tokens([bad, good], scores)
    assert isinstance(bad.error, ValueError) and "the answer cannot follow its schema" in str(bad.error)
    assert bad.ended and good.error is None and not good.ended


def test_a_failing_row_of_an_engine_takes_no_other_with_it(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = Schema.regex("[0-9]{3}")
    plain = engine._chooser

    def chooser(request: Any) -> RowChooser:
        made = plain(request)
        if request.sampling.schema is not None:
            made.allowed = lambda: made._fail(ValueError("on purpose"))  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(engine, "_chooser", chooser)
    prompts = [engine.prepare(ask(text)) for text in ("Hi", "Hello", "How many?")]
    samplings = [Sampling(max_new_tokens=6), Sampling(max_new_tokens=6, schema=schema), Sampling(max_new_tokens=6)]
    requests = [engine.submit(prompt, sampling)[0] for prompt, sampling in zip(prompts, samplings, strict=True)]
    with pytest.raises(ValueError, match="cannot follow its schema: on purpose"):
        requests[1].result()
    assert [one.result().completion_tokens > 0 for one in (requests[0], requests[2])] == [True, True]


def test_several_answers_of_one_prompt_and_the_next_question_of_a_conversation(engine, images) -> None:
    schema, fits = SCHEMAS["object"]
    prompt = engine.prepare(ask("How many stars?", images[0]))
    samplings = [Sampling(max_new_tokens=ROOM, temperature=1.0, seed=seed, schema=schema) for seed in (1, 2, 3)]
    for request in engine.submit(prompt, *samplings):
        assert fits(request.result().text)
    again = engine.stream(ask("How many stars?", images[0]), samplings[0]).result()
    assert fits(again.text)


@pytest.mark.parametrize("checkpoint_name", ["llama", "qwen2_anyres"])
def test_other_tokenizers(checkpoint, images, checkpoint_name: str) -> None:
    """Models of random weights: SentencePiece's pieces, and the vocabulary of Apple's tokenizer."""
    engine = TransformersEngine(str(checkpoint(checkpoint_name)), dtype="float32", device="cpu")
    for name, (schema, fits) in SCHEMAS.items():
        samplings = [Sampling(max_new_tokens=250, temperature=2.0, seed=seed, schema=schema) for seed in range(4)]
        answers = engine.generate([ask("Describe it.", images[0])] * 4, samplings)
        failed = [answer.text for answer in answers if answer.finish_reason != "stop" or not fits(answer.text)]
        assert failed == [], name
    engine.close()
