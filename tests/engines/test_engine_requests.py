# SPDX-License-Identifier: Apache-2.0
"""Requests that come and go: each has its own answer, sampling and failure, and the process stays as it was."""

import copy
import gc
import itertools
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

from transformers_fastvlm import compat
from transformers_fastvlm.engines import Request, Sampling, TransformersEngine, batching_engine, transformers_engine
from transformers_fastvlm.engines.continuous_rows import PAGE_TOKENS, ContinuousRows
from transformers_fastvlm.inference.image_table import FIRST_ID, SLOT, ImageTable

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
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[Request]]:
    """The requests that have a row, one list a step of the model."""
    seen: list[list[Request]] = []
    step = ContinuousRows.step
    monkeypatch.setattr(ContinuousRows, "step", lambda self: (seen.append(self.running), step(self))[1])
    return seen


def together(engine: TransformersEngine, *asked: tuple[Any, Sampling]) -> list[Request]:
    """Submit conversations, or prompts, so that all wait before the first is answered."""
    prompts = [engine.prepare(one) if isinstance(one, list) else one for one, _ in asked]
    with engine._news:
        return [engine.submit(prompt, sampling)[0] for prompt, (_, sampling) in zip(prompts, asked, strict=True)]


def test_together_is_as_alone(engine, mixed, steps) -> None:
    samplings = [Sampling(max_new_tokens=TOKENS - index) for index in range(4)]
    requests = together(engine, *zip(mixed, samplings, strict=False))
    answers = [request.result() for request in requests]
    assert max(map(len, steps)) == 4
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


def test_each_row_samples_by_its_own_seed(engine, mixed, steps) -> None:
    """Whoever is beside it: greedy rows, rows of other temperatures, other orders, or nobody."""
    rows = [(mixed[0], Sampling(seed=seed, **WARM)) for seed in (1, 2, 1)]
    rows += [(mixed[1], SHORT), (mixed[2], Sampling(seed=1, max_new_tokens=8, temperature=0.7))]
    first = [request.result() for request in together(engine, *rows)]
    again = [request.result() for request in together(engine, *reversed(rows))][::-1]
    assert max(map(len, steps)) == 5
    assert first == again == [engine.stream(*row).result() for row in rows]
    assert first[0] == first[2] != first[1]
    assert (first[3].text, first[3].completion_tokens) == plain(engine, mixed[1], TOKENS)[::2]


def test_seeds_of_a_batch(engine, mixed) -> None:
    """One seed for all gives each conversation that seed plus its index; several are taken as they are."""
    # With a top_p of 0.99, the sum of these probabilities reaches it to the last bit, so rounding decided.
    warm = WARM | {"top_p": 1.0}
    one = engine.generate([mixed[0], mixed[0]], Sampling(seed=2**64 - 1, **warm))
    assert one == engine.generate([mixed[0]] * 2, [Sampling(seed=seed, **warm) for seed in (2**64 - 1, 0)])
    assert one[0] != one[1]
    with pytest.raises(ValueError, match="1 samplings for 2 conversations"):
        engine.generate([mixed[0]] * 2, [SHORT])


def test_several_answers_to_one_prompt_encode_and_prefill_it_once(engine, mixed) -> None:
    prompt = engine.prepare(mixed[2])
    fed: list[int] = []
    hook = engine.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    rows = [Sampling(seed=seed, **WARM) for seed in range(3)]
    answers = [request.result() for request in engine.submit(prompt, *rows)]
    hook.remove()
    assert fed[0] == prompt.tokens and sum(fed[1:]) <= 3 * 8 + 2 * PAGE_TOKENS
    assert [answer.encoded_images for answer in answers] == [2, 0, 0]
    assert answers == [engine.stream(mixed[2], row).result() for row in rows]


def test_greedy_although_the_checkpoint_says_otherwise(engine, mixed) -> None:
    expected = plain(engine, mixed[0], TOKENS)
    config = engine.model.generation_config
    config.update(do_sample=True, temperature=1.9, top_k=3, top_p=0.7, num_beams=2, num_return_sequences=2)
    config.update(return_dict_in_generate=True, output_scores=True, max_length=2000)
    before = config.to_dict()
    answers = [engine.stream(mixed[0], SHORT).result(), *engine.generate([mixed[0], mixed[0]], SHORT)]
    for answer in answers:
        assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == expected
    assert engine.model.generation_config is config and config.to_dict() == before


def test_beams(engine, mixed) -> None:
    found = engine.stream(mixed[0], Sampling(max_new_tokens=6, num_beams=2)).result()
    inputs = engine.processor.apply_chat_template(
        mixed[0], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with compat.plain_attention(engine.model):
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
    """One greedy, one sampling, one streaming, all at once."""
    rows = [(conversation, Sampling(seed=index, **WARM)) for index, conversation in enumerate(mixed)]
    greedy, sampled = engine.generate(mixed, SHORT), [engine.stream(*row).result() for row in rows]
    with ThreadPoolExecutor(3) as pool:
        work = [
            pool.submit(lambda: [engine.generate(mixed, SHORT) for _ in range(2)]),
            pool.submit(lambda: [engine.generate(mixed, [row[1] for row in rows]) for _ in range(2)]),
            pool.submit(lambda: [engine.stream(one, SHORT).result() for one in mixed]),
        ]
        found = [one.result() for one in work]
    assert found == [[greedy] * 2, [sampled] * 2, greedy]


def test_a_second_question_computes_only_what_is_new(engine, images) -> None:
    first = engine.stream(ask(QUESTION, images[0]), SHORT).result()
    talk = [*ask(QUESTION, images[0]), {"role": "assistant", "content": first.text}, *ask("And now?")]
    second = engine.stream(talk, SHORT).result()
    assert (first.cached_tokens, first.encoded_images, second.encoded_images) == (0, 1, 0)
    assert first.prompt_tokens - PAGE_TOKENS - 5 < second.cached_tokens < first.prompt_tokens
    assert (second.text, second.completion_tokens) == plain(engine, talk, TOKENS)[::2]
    other = engine.stream(ask(QUESTION, images[1]), SHORT).result()  # the same words about another image
    assert other.cached_tokens < PAGE_TOKENS * 2 and other.text == plain(engine, ask(QUESTION, images[1]), TOKENS)[0]


def test_prompts_that_are_not_used_leave_no_images(engine, images) -> None:
    engine._images._kept_tokens = 0
    stored = [weakref.ref(one) for one in engine.prepare(ask(QUESTION, *images)).inputs["images"]]
    engine.prepare(ask(QUESTION, images[0].rotate(90)))
    assert [one() for one in stored] == [None, None]


def test_ids_of_images_are_used_again_without_their_old_pages(engine, images) -> None:
    """As after millions of images: the second image gets the ids of the first, which is gone."""
    engine._images = ImageTable(kept_tokens=0, last_id=FIRST_ID + 2 * SLOT - 1)
    for image in (images[0], images[1], images[0].rotate(180), images[1].rotate(180)):
        answer = engine.stream(ask(QUESTION, image), SHORT).result()
        assert (answer.text, answer.completion_tokens) == plain(engine, ask(QUESTION, image), TOKENS)[::2]
    assert engine._images.rounds > 0


def test_a_prompt_that_is_longer_than_the_cache_is_answered_alone(engine, mixed, steps, monkeypatch: Any) -> None:
    monkeypatch.setattr(transformers_engine, "ROW_TOKENS", 8)
    monkeypatch.setattr(transformers_engine, "MAX_TOKENS", 64)
    answers = engine.generate(mixed, SHORT)
    assert [(one.text, one.completion_tokens) for one in answers] == [plain(engine, one, TOKENS)[::2] for one in mixed]
    assert all(request.prompt.tokens <= 64 for rows in steps for request in rows)


def test_more_tokens_than_the_cache_holds(endless, mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows give their pages back and are computed again; the tokens stay the same."""
    longest = max(endless.prepare(one).tokens for one in mixed)
    monkeypatch.setattr(transformers_engine, "ROW_TOKENS", (longest + 120) // 8)
    monkeypatch.setattr(transformers_engine, "MAX_TOKENS", 64)
    answers = endless.generate(mixed, Sampling(max_new_tokens=40))
    assert [one.text for one in answers] == [plain(endless, one, 40)[0] for one in mixed]


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
def test_an_image_that_cannot_be_encoded_fails_its_request_only(engine, mixed, caplog: Any, streams: bool) -> None:
    bad = engine.prepare(mixed[0])
    (image,) = bad.inputs["images"]
    image.inputs = {name: value[..., :3] for name, value in image.inputs.items()}
    good = [mixed[1], mixed[3]]
    requests = together(engine, (good[0], SHORT), (bad, SHORT), (good[1], SHORT))
    with pytest.raises((ValueError, RuntimeError)):
        requests[1].result()
    with pytest.raises((ValueError, RuntimeError)):
        list(requests[1])
    assert "an image cannot be encoded" in caplog.text
    for request, conversation in zip(requests[::2], good, strict=True):
        text = "".join(request) if streams else request.result().text
        assert text == plain(engine, conversation, TOKENS)[0]


def test_a_step_that_fails_is_tried_again_row_by_row(engine, mixed, steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that was passed on is not said twice, and only the row that fails alone fails."""
    requests = together(engine, *((one, SHORT) for one in mixed[:3]))
    step = ContinuousRows.step

    def fails(self: ContinuousRows) -> list[Request]:
        if (len(self.running) == 3 and requests[0].tokens == 5) or self.running == [requests[2]]:
            raise MemoryError("in the middle")
        return step(self)

    monkeypatch.setattr(ContinuousRows, "step", fails)
    texts = ["".join(one) for one in requests[:2]]
    with pytest.raises(MemoryError):
        requests[2].result()
    assert texts == [plain(engine, one, TOKENS)[0] for one in mixed[:2]]
    assert max(map(len, steps[-10:])) == 1
    monkeypatch.setattr(ContinuousRows, "step", step)
    assert engine.stream(mixed[2], SHORT).result().text == plain(engine, mixed[2], TOKENS)[0]


def test_scores_that_are_nan_are_an_error_of_their_row(engine, mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = engine.prepare(mixed[1]), engine.prepare(mixed[0])
    engine._images.encode(engine.model, bad.inputs["images"])
    bad.inputs["images"][0].features = bad.inputs["images"][0].features * float("nan")
    first, second = together(engine, (bad, SHORT), (good, SHORT))
    with pytest.raises(ValueError, match="first scores are NaN"):
        first.result()
    assert second.result().text == plain(engine, mixed[1], TOKENS)[0]


def test_a_listener_that_raises_harms_nobody(engine, mixed) -> None:
    heard = threading.Event()

    def changed() -> None:
        heard.set()
        raise RuntimeError("the event loop is closed")

    (first,) = engine.submit(engine.prepare(mixed[1]), SHORT, changed=changed)
    assert engine.stream(mixed[1], SHORT).result().finish_reason != "cancelled"
    assert heard.is_set() and engine.is_alive and first.cancelled


def ends_by(error: BaseException) -> Any:
    def step(rows: ContinuousRows) -> None:
        raise error

    return step


def test_a_thread_that_ends_leaves_nobody_waiting(engine, mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContinuousRows, "step", ends_by(SystemExit()))  # what no request can be the reason of
    requests = together(engine, (mixed[1], SHORT), (mixed[1], Sampling(num_beams=2)))
    for request in (*requests, *engine.submit(engine.prepare(mixed[1]), SHORT)):
        with pytest.raises(RuntimeError, match="thread has ended"):
            request.result()
    assert not engine.is_alive


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this PyTorch does not tell a lost device")
def test_a_lost_device_ends_the_thread(engine, mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContinuousRows, "step", ends_by(torch.AcceleratorError("device-side assert triggered", 710)))
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


def test_images_that_are_encoded_together_are_bounded(engine, images, monkeypatch: pytest.MonkeyPatch) -> None:
    """First as many as fit, then one between two steps, so that no row waits for more than one."""
    pixels = engine.prepare(ask(QUESTION, images[0])).inputs["images"][0].pixels
    monkeypatch.setattr(batching_engine, "MAX_PIXELS", 2 * pixels)
    done: list[Any] = []
    encode, step = ImageTable.encode, ContinuousRows.step
    monkeypatch.setattr(ImageTable, "encode", lambda *args: (done.append(len(args[2])), encode(*args))[1])
    monkeypatch.setattr(ContinuousRows, "step", lambda self: (done.append("step"), step(self))[1])
    asked = [ask(QUESTION, images[0].rotate(angle)) for angle in (0, 90, 180, 270)]
    for request in together(engine, *((one, Sampling(max_new_tokens=1)) for one in asked)):
        request.result()
    groups = [number for number in done if number != "step"]
    assert sum(groups) >= 3 and max(groups) <= 2
    assert all("step" in pair for pair in itertools.pairwise(done))


def test_images_are_let_go_with_the_answer(engine, mixed) -> None:
    """Not when Python looks for cycles, until which thousands of requests may come."""
    requests = together(engine, (mixed[0], SHORT), (mixed[3], SHORT))
    engine._images._kept_tokens = 0
    stored = [weakref.ref(image) for request in requests for image in request.prompt.inputs["images"]]
    gc.disable()
    try:
        for request in requests:
            request.result()
        engine._thread.join(0.2)  # it lets go once it waits again
        del request, requests
        engine.stream(ask(QUESTION, mixed[0][0]["content"][0]["image"].rotate(90)), SHORT).result()
        assert [one() for one in stored] == [None, None]
    finally:
        gc.enable()
