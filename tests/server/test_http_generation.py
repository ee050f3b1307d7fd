# SPDX-License-Identifier: Apache-2.0
"""The model's thread: answers made together are single ones, and work that nobody wants ends."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import transformers_fastvlm  # noqa: F401
from transformers_fastvlm.server import generation
from transformers_fastvlm.server.generation import Job, Worker

PATIENCE = 600
TOKENS = 12


@pytest.fixture(scope="module", params=["qwen2_tied", "qwen2_anyres"])
def model_and_processor(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> tuple[Any, Any]:
    directory = checkpoint(request.param)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(directory)


@pytest.fixture
def worker(model_and_processor: tuple[Any, Any]) -> Iterator[Worker]:
    one = Worker(*model_and_processor, batch_size=8)
    yield one
    one.close()


def prompts(processor: Any) -> list[dict[str, Any]]:
    """Prompts of several lengths: without a picture, with one, and with two."""
    colours = [Image.new("RGB", size, colour) for size, colour in (((64, 64), "red"), ((90, 30), "blue"))]
    found = []
    for text, images in (
        ("a", []),
        ("What is it?", colours[:1]),
        ("Compare them, please.", colours),
        ("b", colours[1:]),
    ):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        found.append(
            dict(
                processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )
            )
        )
    return found


class Asked:
    """A job, and the moment at which it is done."""

    def __init__(self, inputs: dict[str, Any], **options: Any) -> None:
        self.over = threading.Event()
        self.job = Job(**{"inputs": inputs, "max_tokens": TOKENS, "changed": self._look} | options)

    def _look(self) -> None:
        if self.job.done:
            self.over.set()

    def wait(self) -> Job:
        assert self.over.wait(PATIENCE)
        return self.job


def ask(worker: Worker, *asked: Asked) -> list[tuple[str, int, str | None]]:
    for one in asked:
        worker.submit(one.job)
    if not worker._thread.is_alive():
        worker.start()
    jobs = [one.wait() for one in asked]
    assert [job.error for job in jobs] == [None] * len(jobs)
    return [(row.text, row.tokens, row.reason) for job in jobs for row in job.answers]


def test_together_is_as_alone(worker: Worker, model_and_processor: tuple[Any, Any], monkeypatch: Any) -> None:
    model, processor = model_and_processor
    sizes = []
    answer = worker._answer
    monkeypatch.setattr(worker, "_answer", lambda jobs: (sizes.append(len(jobs)), answer(jobs)))
    inputs = prompts(processor)
    # All wait before the thread starts, so that they are answered together; each ends by itself.
    together = ask(worker, *(Asked(one, max_tokens=TOKENS - index) for index, one in enumerate(inputs)))
    alone = [ask(worker, Asked(one, max_tokens=TOKENS - index))[0] for index, one in enumerate(inputs)]
    assert sizes == [4, 1, 1, 1, 1]
    assert together == alone
    model.generation_config = worker._config
    for (text, tokens, _), one in zip(alone, inputs, strict=True):
        output = model.generate(**one, do_sample=False, max_new_tokens=tokens)
        assert text == processor.decode(output[0, one["input_ids"].shape[1] :], skip_special_tokens=True)


def test_requests_that_sample_are_alone_and_follow_their_seed(
    worker: Worker, model_and_processor: tuple[Any, Any]
) -> None:
    inputs = prompts(model_and_processor[1])[1]
    first, second, third = (Asked(inputs, temperature=1.5, seed=seed, rows=3, max_tokens=6) for seed in (1, 2, 1))
    rows = ask(worker, first, second, third)
    assert rows[:3] == rows[6:] and rows[:3] != rows[3:6]


def test_cancelled_work_ends(worker: Worker, model_and_processor: tuple[Any, Any]) -> None:
    worker._ends = frozenset()
    worker._config.eos_token_id = None
    inputs = prompts(model_and_processor[1])
    leaving = Asked(inputs[0], max_tokens=100_000, stream=True)
    waiting, staying = Asked(inputs[1], temperature=1.0), Asked(inputs[1])
    begun = threading.Event()
    leaving.job.changed = lambda: (begun.set(), leaving._look())[1]
    for one in (leaving, waiting):
        worker.submit(one.job)
    worker.start()
    assert begun.wait(PATIENCE)
    worker.cancel(waiting.job)
    worker.cancel(leaving.job)
    assert ask(worker, staying)[0][1:] == (TOKENS, "length")
    assert leaving.wait().answers[0].reason is None and not waiting.job.done


def test_a_failure_is_the_request_s_own(worker: Worker, model_and_processor: tuple[Any, Any], caplog: Any) -> None:
    good = prompts(model_and_processor[1])[1]
    bad = dict(good, input_ids=good["input_ids"][:, :-1], attention_mask=good["attention_mask"])
    failing = Asked(bad)
    worker.submit(failing.job)
    worker.start()
    assert isinstance(failing.wait().error, ValueError)
    assert "1 requests failed" in caplog.text
    assert ask(worker, Asked(good))[0][2] is not None


def test_a_failure_is_not_that_of_others_in_its_batch(worker: Worker, model_and_processor: tuple[Any, Any]) -> None:
    first, second, third, _ = prompts(model_and_processor[1])
    without_image = {name: second[name] for name in ("input_ids", "attention_mask")}
    bad, good = Asked(without_image), [Asked(first, stream=True), Asked(third)]
    for one in (good[0], bad, good[1]):
        worker.submit(one.job)
    worker.start()
    assert isinstance(bad.wait().error, ValueError)
    answers = [one.wait().answers[0].text for one in good]
    assert [one.job.error for one in good] == [None, None]
    assert answers == [ask(worker, Asked(one))[0][0] for one in (first, third)]


def test_an_answer_that_is_begun_again_says_nothing_twice(
    worker: Worker, model_and_processor: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = prompts(model_and_processor[1])[:2]
    watch, steps = generation._Watch.__call__, []

    def fails_once(self: Any, *arguments: Any, **options: Any) -> Any:
        steps.append(len(self.rows))
        found = watch(self, *arguments, **options)
        if steps.count(2) == 6 and len(self.rows) == 2:
            raise MemoryError("in the middle")
        return found

    monkeypatch.setattr(generation._Watch, "__call__", fails_once)
    together = [Asked(one, stream=True) for one in inputs]
    rows = ask(worker, *together)
    assert steps.count(1) > 0
    for one, (text, _, _) in zip(together, rows, strict=True):
        assert "".join(piece for _, piece in one.job.pieces) == text
    assert rows == [ask(worker, Asked(one))[0] for one in inputs]


def test_a_listener_that_raises_harms_nobody(worker: Worker, model_and_processor: tuple[Any, Any]) -> None:
    inputs = prompts(model_and_processor[1])[1]
    heard = threading.Event()

    def changed() -> None:
        heard.set()
        raise RuntimeError("the event loop is closed")

    worker.submit(Job(inputs=inputs, max_tokens=TOKENS, changed=changed, stream=True))
    assert len(ask(worker, Asked(inputs))) == 1
    assert heard.is_set() and worker.is_alive


def test_a_thread_that_ends_leaves_nobody_waiting(worker: Worker, model_and_processor: tuple[Any, Any]) -> None:
    inputs = prompts(model_and_processor[1])[1]
    worker._answer = lambda jobs: (_ for _ in ()).throw(SystemExit)  # what no request can be the reason of
    begun, waiting = Asked(inputs, temperature=1.0), Asked(inputs)
    for one in (begun, waiting):
        worker.submit(one.job)
    assert not worker.is_alive
    worker.start()
    assert "thread has ended" in str(begun.wait().error) and "thread has ended" in str(waiting.wait().error)
    assert not worker.is_alive
    late = Asked(inputs)
    worker.submit(late.job)
    assert "thread has ended" in str(late.wait().error)


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this PyTorch does not tell a lost device")
def test_a_lost_device_ends_the_thread(worker: Worker, model_and_processor: tuple[Any, Any]) -> None:
    worker._answer = lambda jobs: (_ for _ in ()).throw(torch.AcceleratorError("device-side assert triggered", 710))
    asked = Asked(prompts(model_and_processor[1])[1])
    worker.submit(asked.job)
    worker.start()
    assert asked.wait().error is not None
    worker._thread.join(PATIENCE)
    assert not worker.is_alive


def test_images_of_a_batch_are_bounded(
    worker: Worker, model_and_processor: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.batch_size = 3
    _, one, two, _ = prompts(model_and_processor[1])
    images: list[list[int]] = []
    answer = worker._answer
    monkeypatch.setattr(worker, "_answer", lambda jobs: (images.append([job.images for job in jobs]), answer(jobs)))
    ask(worker, *(Asked(inputs, max_tokens=1) for inputs in (two, one, one, two, two)))
    assert images == [[2, 1], [1, 2], [2]]


def test_the_process_is_as_before(model_and_processor: tuple[Any, Any]) -> None:
    model = model_and_processor[0]
    config, state = model.generation_config, torch.random.get_rng_state()
    one = Worker(*model_and_processor, batch_size=8)
    inputs = prompts(model_and_processor[1])[1]
    ask(one, Asked(inputs, temperature=1.0, seed=3), Asked(inputs, temperature=1.0), Asked(inputs))
    assert torch.equal(torch.random.get_rng_state(), state)
    one.close()
    assert model.generation_config is config


def test_pictures_are_let_go_with_the_answer(worker: Worker, model_and_processor: tuple[Any, Any]) -> None:
    """Not when Python looks for cycles, until which thousands of requests may come."""
    over = [threading.Event(), threading.Event()]
    inputs = [prompts(model_and_processor[1])[1] for _ in over]
    pictures = [weakref.ref(one["pixel_values"]) for one in inputs]
    gc.disable()
    try:
        for one, event in zip(inputs, over, strict=True):
            worker.submit(Job(inputs=one, max_tokens=2, changed=event.set))
        del one, inputs
        worker.start()
        assert all(event.wait(PATIENCE) for event in over)
        worker.close()
        assert [picture() for picture in pictures] == [None, None]
    finally:
        gc.enable()
