# SPDX-License-Identifier: Apache-2.0
"""Many requests, some at a time: answers come as they end, in a bounded window, and errors are theirs alone."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_cases import ask

from transformers_fastvlm.engines import Request, Sampling, TransformersEngine
from transformers_fastvlm.engines.requests_in_flight import as_ended

LONG, SHORT = Sampling(max_new_tokens=3000), Sampling(max_new_tokens=2)


@pytest.fixture(scope="module")
def endless(checkpoint: Callable[[str], Path]) -> Iterator[TransformersEngine]:
    """An engine whose answers end by their length only."""
    engine = TransformersEngine(str(checkpoint("qwen2_tied")), dtype="float32", device="cpu", batch_size=2)
    engine.model.generation_config.eos_token_id = None
    yield engine
    engine.close()


class Asked:
    """Starts requests, one for each sampling, and keeps them."""

    def __init__(self, engine: TransformersEngine, *samplings: Sampling) -> None:
        self.engine, self.samplings = engine, samplings
        self.started: list[Request] = []
        self.ended = self.most = 0  # passed on; and the most that were not

    def __iter__(self) -> Iterator[tuple[int, Callable[[], Request]]]:
        for number, sampling in enumerate(self.samplings):
            yield number, functools.partial(self.start, sampling)

    def start(self, sampling: Sampling) -> Request:
        self.started.append(self.engine.stream(ask("Hi"), sampling))
        self.most = max(self.most, len(self.started) - self.ended)
        return self.started[-1]


def test_a_long_answer_holds_up_no_other(endless: TransformersEngine) -> None:
    asked = Asked(endless, LONG, *[SHORT] * 20)
    order: list[int] = []
    for group in as_ended(asked, endless.batch_size):
        order += [key for key, _ in group]
        asked.ended += len(group)
        if len(order) == 20:
            assert not asked.started[0].done
            asked.started[0].cancel()
    assert sorted(order[:20]) == list(range(1, 21)) and order[20:] == [0]
    assert asked.most <= 3, "two rows, and one that waits"


@pytest.mark.parametrize(("rows", "most"), [((4, None), 6), ((4, 1), 2), ((None, 3), 5), ((None,), 9)])
def test_the_window_follows_the_smallest_number_of_rows(
    endless: TransformersEngine, rows: tuple[int | None, ...], most: int
) -> None:
    asked = Asked(endless, *[SHORT] * 9)
    for group in as_ended(asked, *rows):
        asked.ended += len(group)
    assert asked.ended == 9 and asked.most <= most


def test_errors_are_those_of_their_request(endless: TransformersEngine) -> None:
    texts = ("Hi", "long " * 40_000, "Hi")
    asked = ((n, functools.partial(endless.stream, ask(text), SHORT)) for n, text in enumerate(texts))
    found = dict(pair for group in as_ended(asked, 1) for pair in group)
    assert isinstance(found[1], ValueError) and "context" in str(found[1])
    assert found[0] == found[2] == endless.generate([ask("Hi")], SHORT)[0]


def test_who_leaves_early_cancels_what_runs(endless: TransformersEngine) -> None:
    asked = Asked(endless, LONG, SHORT, LONG, LONG)
    with contextlib.closing(as_ended(asked, endless.batch_size)) as each:
        assert [key for key, _ in next(each)] == [1]
    left = [request for request in asked.started if request is not asked.started[1]]
    assert left and all(request.cancelled for request in left)
    assert {request.result().finish_reason for request in left} == {"cancelled"}
