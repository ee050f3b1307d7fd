# SPDX-License-Identifier: Apache-2.0
"""Requests that come and go: each has its own answer, sampling and failure, and the process stays as it was."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import QUESTION, ask, plain
from transformers import AutoModelForImageTextToText, AutoProcessor

import transformers_fastvlm  # noqa: F401
from transformers_fastvlm.engines import Request, Sampling, TransformersEngine, transformers_engine

TOKENS = 12
SHORT = Sampling(max_new_tokens=TOKENS)
WARM = {"max_new_tokens": 8, "temperature": 2.0, "top_p": 0.99}


@pytest.fixture(scope="module", params=["qwen2_tied", "qwen2_anyres"])
def loaded(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> tuple[Any, Any]:
    directory = checkpoint(request.param)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(directory)


@pytest.fixture
def engine(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[TransformersEngine]:
    config = loaded[0].generation_config
    loaded[0].generation_config = copy.deepcopy(config)
    one = TransformersEngine(*loaded, batch_size=8)
    yield one
    one.close()
    loaded[0].generation_config = config


@pytest.fixture
def endless(engine: TransformersEngine) -> TransformersEngine:
    """An engine whose answers end by their length only."""
    engine.model.generation_config.eos_token_id = None
    return engine


@pytest.fixture
def batches(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> list[list[Request]]:
    """The requests that are answered together, one list a time."""
    seen: list[list[Request]] = []
    answer = engine._answer
    monkeypatch.setattr(engine, "_answer", lambda requests: (seen.append(list(requests)), answer(requests)))
    return seen


def together(engine: TransformersEngine, *asked: tuple[Any, Sampling]) -> list[Request]:
    """Submit conversations, or prompts, so that all wait before the first is answered."""
    prompts = [engine.prepare(one) if isinstance(one, list) else one for one, _ in asked]
    with engine._news:
        return [engine.submit(prompt, sampling)[0] for prompt, (_, sampling) in zip(prompts, asked, strict=True)]


def test_together_is_as_alone(engine, mixed, batches) -> None:
    samplings = [Sampling(max_new_tokens=TOKENS - index) for index in range(4)]
    requests = together(engine, *zip(mixed, samplings, strict=False))
    answers = [request.result() for request in requests]
    assert [len(one) for one in batches] == [4]
    for answer, conversation, sampling in zip(answers, mixed, samplings, strict=False):
        found = (answer.text, answer.prompt_tokens, answer.completion_tokens)
        assert found == plain(engine, conversation, sampling.max_new_tokens)
        assert engine.stream(conversation, sampling).result() == answer


def test_text_comes_as_it_is_made(endless, mixed) -> None:
    request = endless.stream(mixed[0], Sampling(max_new_tokens=60))
    pieces = list(request)
    answer = request.result()
    assert len(pieces) > 10 and "".join(pieces) == answer.text == plain(endless, mixed[0], 60)[0]
    assert answer.seconds.first_token is not None
    assert 0 < answer.seconds.first_token < answer.seconds.generate


def test_each_row_samples_by_its_own_seed(engine, mixed, batches) -> None:
    """Whoever is beside it: greedy rows, rows of other temperatures, other orders, or nobody."""
    rows = [(mixed[0], Sampling(seed=seed, **WARM)) for seed in (1, 2, 1)]
    rows += [(mixed[1], SHORT), (mixed[2], Sampling(seed=1, max_new_tokens=8, temperature=0.7))]
    first = [request.result() for request in together(engine, *rows)]
    again = [request.result() for request in together(engine, *reversed(rows))][::-1]
    assert max(map(len, batches)) == 5
    assert first == again == [engine.stream(*row).result() for row in rows]
    assert first[0] == first[2] != first[1]
    assert (first[3].text, first[3].completion_tokens) == plain(engine, mixed[1], TOKENS)[::2]


def test_seeds_of_a_batch(engine, mixed) -> None:
    """One seed for all gives each conversation that seed plus its index; several are taken as they are."""
    one = engine.generate([mixed[0], mixed[0]], Sampling(seed=2**64 - 1, **WARM))
    assert one == engine.generate([mixed[0]] * 2, [Sampling(seed=seed, **WARM) for seed in (2**64 - 1, 0)])
    assert one[0] != one[1]
    with pytest.raises(ValueError, match="1 samplings for 2 conversations"):
        engine.generate([mixed[0]] * 2, [SHORT])


def test_several_answers_to_one_prompt_encode_and_prefill_it_once(engine, mixed, batches) -> None:
    prompt = engine.prepare(mixed[2])
    fed: list[int] = []
    hook = engine.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    rows = [Sampling(seed=seed, **WARM) for seed in range(3)]
    answers = [request.result() for request in engine.submit(prompt, *rows)]
    hook.remove()
    assert len(batches) == 1 and fed[0] == prompt.tokens - 1 and sum(fed[1:]) <= 3 * 8
    assert answers == [engine.stream(mixed[2], row).result() for row in rows]
    assert answers[0].encoded_images == 2


def test_greedy_although_the_checkpoint_says_otherwise(engine, mixed) -> None:
    expected = plain(engine, mixed[0], TOKENS)
    config = engine.model.generation_config
    config.update(do_sample=True, temperature=1.9, top_k=3, top_p=0.7, num_beams=2, num_return_sequences=2)
    config.update(return_dict_in_generate=True, output_scores=True, max_length=2000)
    before = config.to_dict()
    answers = [engine.stream(mixed[0], SHORT, memory=memory).result() for memory in (None, engine.new_memory())]
    answers += engine.generate([mixed[0], mixed[0]], SHORT)
    for answer in answers:
        assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == expected
    assert engine.model.generation_config is config and config.to_dict() == before


def test_beams(engine, mixed) -> None:
    found = engine.stream(mixed[0], Sampling(max_new_tokens=6, num_beams=2)).result()
    inputs = engine.prepare(mixed[0]).inputs
    output = engine.model.generate(**inputs, max_new_tokens=6, num_beams=2, do_sample=False)
    assert found.text == engine.processor.decode(output[0, found.prompt_tokens :], skip_special_tokens=True).strip()
    assert found.seconds.first_token is None
    warm = Sampling(num_beams=2, seed=3, **WARM)
    assert engine.stream(mixed[0], warm).result() == engine.stream(mixed[0], warm).result()


def test_the_process_is_as_before(engine, mixed) -> None:
    config, state, threads = engine.model.generation_config, torch.random.get_rng_state(), threading.active_count()
    before = config.to_dict()
    warm, beams = Sampling(**WARM), Sampling(num_beams=2, **WARM)
    for sampling in (Sampling(seed=3, **WARM), warm, beams, Sampling(num_beams=2, seed=3, **WARM), SHORT):
        engine.generate([mixed[0]], sampling)
    assert torch.equal(torch.random.get_rng_state(), state)
    # A seeded call does not make those without a seed repeat, whatever the caller's own seed is.
    texts = []
    for _ in range(4):
        torch.manual_seed(0)
        engine.generate([mixed[0]], Sampling(seed=3, **WARM))
        texts.append(engine.generate([mixed[0]], warm)[0].text)
    assert len(set(texts)) > 1
    engine.close()
    assert config.to_dict() == before and threading.active_count() < threads + 1


def test_threads_share_an_engine(engine, mixed) -> None:
    """One greedy, one sampling, one streaming with a memory, all at once."""
    rows = [(conversation, Sampling(seed=index, **WARM)) for index, conversation in enumerate(mixed)]
    greedy, sampled = engine.generate(mixed, SHORT), [engine.stream(*row).result() for row in rows]
    memory = engine.new_memory()
    with ThreadPoolExecutor(3) as pool:
        work = [
            pool.submit(lambda: [engine.generate(mixed, SHORT) for _ in range(2)]),
            pool.submit(lambda: [engine.generate(mixed, [row[1] for row in rows]) for _ in range(2)]),
            pool.submit(lambda: [engine.stream(one, SHORT, memory=memory).result() for one in mixed]),
        ]
        found = [one.result() for one in work]
    assert found == [[greedy] * 2, [sampled] * 2, greedy]


def test_a_second_question_computes_only_what_is_new(engine, images) -> None:
    memory = engine.new_memory()
    first = engine.stream(ask(QUESTION, images[0]), SHORT, memory=memory).result()
    talk = [*ask(QUESTION, images[0]), {"role": "assistant", "content": first.text}, *ask("And now?")]
    second = engine.stream(talk, SHORT, memory=memory).result()
    assert (first.cached_tokens, first.encoded_images, second.encoded_images) == (0, 1, 0)
    assert second.cached_tokens > first.prompt_tokens - 5 and second == engine.stream(talk, SHORT).result()
    assert engine.stream(talk, SHORT).result().cached_tokens == 0  # without a memory nothing is kept


def test_old_memories_are_emptied(engine, mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "KEPT_MEMORIES", 2)
    memories = [engine.new_memory() for _ in range(3)]
    for memory in memories:
        engine.stream(mixed[0], SHORT, memory=memory).result()
    assert [memory._cache.get_seq_length() > 0 for memory in memories] == [False, True, True]
    engine.forget(memories[1])
    engine.close()
    assert [memory._cache.get_seq_length() for memory in memories] == [0, 0, 0]


# Ends that nobody wished for


def test_cancelled_work_ends(endless, mixed) -> None:
    running, waiting, beside = together(
        endless, (mixed[0], Sampling(max_new_tokens=3000)), (mixed[1], Sampling(num_beams=2)), (mixed[1], SHORT)
    )
    next(iter(running))
    waiting.cancel()
    assert waiting.done and waiting.result().finish_reason == "cancelled"
    running.cancel()
    answer = running.result()
    assert answer.finish_reason == "cancelled" and answer.text and answer.completion_tokens < 3000
    assert beside.result().finish_reason == "length"


def test_a_cancelled_row_is_given_up_within_a_token(endless, mixed) -> None:
    leaving, staying = together(endless, *((mixed[index], Sampling(max_new_tokens=40)) for index in range(2)))
    next(iter(leaving))
    leaving.cancel()
    made = leaving.tokens
    assert staying.result().completion_tokens == 40
    assert leaving.result().completion_tokens <= made + 1
    assert staying.result().text == plain(endless, mixed[1], 40)[0]


@pytest.mark.parametrize("streams", [True, False])
def test_a_failure_is_the_request_s_own(engine, mixed, caplog: Any, streams: bool) -> None:
    bad = engine.prepare(mixed[0])
    del bad.inputs["pixel_values"]
    good = [mixed[1], mixed[2]]
    requests = together(engine, (good[0], SHORT), (bad, SHORT), (good[1], SHORT))
    with pytest.raises(ValueError, match=r"<image>|pixel_values"):
        requests[1].result()
    with pytest.raises(ValueError, match=r"<image>|pixel_values"):
        list(requests[1])
    assert "3 requests failed" in caplog.text and "1 requests failed" in caplog.text
    for request, conversation in zip(requests[::2], good, strict=True):
        text = "".join(request) if streams else request.result().text
        assert text == plain(engine, conversation, TOKENS)[0]


def test_an_answer_that_is_begun_again_says_nothing_twice(engine, mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, steps = transformers_engine._Watch.__call__, []

    def fails_once(self: Any, *arguments: Any, **options: Any) -> Any:
        steps.append(len(self.requests))
        found = watch(self, *arguments, **options)
        if steps.count(2) == 6 and len(self.requests) == 2:
            raise MemoryError("in the middle")
        return found

    monkeypatch.setattr(transformers_engine._Watch, "__call__", fails_once)
    requests = together(engine, *((one, SHORT) for one in mixed[:2]))
    texts = ["".join(request) for request in requests]
    assert steps.count(1) > 0
    assert texts == [plain(engine, one, TOKENS)[0] for one in mixed[:2]]


def test_a_listener_that_raises_harms_nobody(engine, mixed) -> None:
    heard = threading.Event()

    def changed() -> None:
        heard.set()
        raise RuntimeError("the event loop is closed")

    (first,) = engine.submit(engine.prepare(mixed[1]), SHORT, changed=changed)
    assert engine.stream(mixed[1], SHORT).result().finish_reason != "cancelled"
    assert heard.is_set() and engine.is_alive and first.cancelled


def ends_by(error: BaseException) -> Any:
    def answer(requests: list[Request]) -> None:
        raise error

    return answer


def test_a_thread_that_ends_leaves_nobody_waiting(engine, mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_answer", ends_by(SystemExit()))  # what no request can be the reason of
    requests = together(engine, (mixed[1], Sampling(num_beams=2)), (mixed[1], SHORT))
    for request in (*requests, *engine.submit(engine.prepare(mixed[1]), SHORT)):
        with pytest.raises(RuntimeError, match="thread has ended"):
            request.result()
    assert not engine.is_alive


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this PyTorch does not tell a lost device")
def test_a_lost_device_ends_the_thread(engine, mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_answer", ends_by(torch.AcceleratorError("device-side assert triggered", 710)))
    request = engine.stream(mixed[1], SHORT)
    thread = engine._thread
    with pytest.raises(RuntimeError, match="thread has ended"):
        request.result()
    thread.join()
    assert not engine.is_alive


def test_closing_answers_what_is_queued(engine, mixed) -> None:
    requests = together(engine, *((one, SHORT) for one in mixed[:3]))
    engine.close()
    assert all(request.done and request.answer is not None for request in requests)
    engine.close()  # once more does nothing


def test_images_of_a_batch_are_bounded(engine, mixed, batches) -> None:
    engine.batch_size = 3
    one, two = mixed[0], mixed[2]
    tiny = Sampling(max_new_tokens=1)
    for request in together(engine, *((conversation, tiny) for conversation in (two, one, one, two, two))):
        request.result()
    assert [[len(request.prompt.image_tokens) for request in batch] for batch in batches] == [[2, 1], [1, 2], [2]]


def test_images_are_let_go_with_the_answer(engine, mixed) -> None:
    """Not when Python looks for cycles, until which thousands of requests may come."""
    requests = together(engine, (mixed[0], SHORT), (mixed[3], SHORT))
    pixels = [weakref.ref(request.prompt.inputs["pixel_values"]) for request in requests]
    gc.disable()
    try:
        for request in requests:
            request.result()
        engine._thread.join(0.2)  # it lets go once it waits again
        del request, requests
        engine.stream(mixed[1], SHORT).result()
        assert [one() for one in pixels] == [None, None]
    finally:
        gc.enable()
