# SPDX-License-Identifier: Apache-2.0
"""Order of training: batches of one kind and of similar length, the same steps on every process, the same each time."""

import logging
from collections import Counter
from typing import Any

import numpy as np
import pytest
from torch.utils.data import BatchSampler, ConcatDataset

from transformers_fastvlm import data
from transformers_fastvlm.data import ModalityLengthSampler, row_lengths
from transformers_fastvlm.data.batching import grouped_sampler


def made_up(images: int, texts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and kinds of rows, in a random order."""
    random = np.random.default_rng(seed)
    has_image = random.permutation(np.arange(images + texts) < images)
    return random.integers(5, 2000, images + texts) + 256 * has_image, has_image


def steps_of(sampler: ModalityLengthSampler) -> list[list[list[int]]]:
    """Batches as accelerate deals them: one list of batches a step, one batch a process."""
    batches = list(BatchSampler(sampler, sampler.batch_size, drop_last=False))
    size = sampler.num_processes
    return [batches[first : first + size] for first in range(0, len(batches), size)]


@pytest.mark.parametrize(("images", "texts"), [(100, 61), (3, 100), (100, 1), (40, 0), (0, 40), (5, 5)])
@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_processes_agree(images: int, texts: int, processes: int, batch_size: int) -> None:
    """Every process has as many batches, all full, and in each step all are of one kind."""
    lengths, has_image = made_up(images, texts)
    sampler = ModalityLengthSampler(lengths, has_image, batch_size=batch_size, num_processes=processes)
    steps = steps_of(sampler)
    assert len(list(sampler)) == len(sampler) == len(steps) * batch_size * processes
    for step in steps:
        assert len(step) == processes and all(len(batch) == batch_size for batch in step)
        assert len({bool(has_image[row]) for batch in step for row in batch}) == 1
    times = Counter(sampler)
    assert set(times) == set(range(images + texts))
    repeated = len(sampler) - images - texts
    assert repeated <= 2 * (batch_size * processes - 1)
    if min(images, texts) >= batch_size * processes:
        assert max(times.values()) <= 2


def test_one_process_takes_each_row_once() -> None:
    lengths, has_image = made_up(50, 31)
    sampler = ModalityLengthSampler(lengths, has_image, batch_size=8)
    order = list(sampler)
    assert sorted(order) == list(range(81)) and len(sampler) == 81
    kinds = [{bool(has_image[row]) for row in order[first : first + 8]} for first in range(0, 81, 8)]
    assert [len(kind) for kind in kinds] == [1] * 9 + [2, 1]  # 48 + 24 rows, then 2 + 7 that are left


@pytest.mark.parametrize("processes", [1, 2])
def test_drop_last(processes: int) -> None:
    lengths, has_image = made_up(50, 31)
    sampler = ModalityLengthSampler(lengths, has_image, batch_size=4, num_processes=processes, drop_last=True)
    step = 4 * processes
    assert len(sampler) == len(list(sampler)) == (50 // step + 31 // step) * step
    assert len(set(sampler)) == len(sampler)
    left_out = [set(range(81)) - set(sampler)]
    sampler.set_epoch(1)
    assert left_out[0] != set(range(81)) - set(sampler)
    with pytest.raises(ValueError, match="81 rows do not fill a step of 1 batches of 64 rows of one kind"):
        ModalityLengthSampler(lengths, has_image, batch_size=64, drop_last=True)


def padding(sampler: Any, lengths: np.ndarray, batch_size: int) -> float:
    """The share of a batch that is padding."""
    batches = [lengths[rows] for rows in BatchSampler(sampler, batch_size, drop_last=False)]
    return 1 - sum(map(sum, batches)) / sum(max(rows) * len(rows) for rows in batches)


def test_lengths_are_grouped() -> None:
    lengths, has_image = made_up(1000, 600)
    sampler = ModalityLengthSampler(lengths, has_image, batch_size=8, num_processes=2)
    assert padding(sampler, lengths, 8) < 0.05
    assert padding(ModalityLengthSampler(None, has_image, batch_size=8), lengths, 8) > 0.3
    # Within a step processes have about the same to do.
    totals = np.array([[lengths[batch].max() for batch in step] for step in steps_of(sampler)])
    assert np.mean(totals.max(1) / totals.min(1)) < 1.02
    # The longest comes first, then lengths are in no order.
    first = steps_of(sampler)[0]
    assert max(lengths[row] for batch in first for row in batch) == lengths.max()
    assert abs(np.corrcoef(totals[1:, 0], np.arange(len(totals) - 1))[0, 1]) < 0.3


def test_the_order_follows_from_seed_and_epoch() -> None:
    lengths, has_image = made_up(60, 40)

    def order(seed: int, epoch: int) -> list[int]:
        sampler = ModalityLengthSampler(lengths, has_image, batch_size=4, num_processes=2, seed=seed)
        list(sampler)  # nothing is left behind by an earlier pass
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"lengths": []}, r"have the shapes \(0,\); expected \(rows,\)"),
        ({"lengths": None}, "have the shapes of None"),
        ({"lengths": [1, 2], "has_image": [True]}, r"have the shapes \(2,\), \(1,\)"),
        ({"lengths": [1], "batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"lengths": [1], "num_processes": 0}, "num_processes is 0"),
        ({"lengths": [1], "window": 0}, "window is 0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ModalityLengthSampler(**{"batch_size": 2, **arguments})


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def test_row_lengths(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        chat("<image>" + "x" * 33, "y" * 40, images=["never opened.png"]),
        chat("x" * 40, "猫" * 40),
        chat("<image><image>" + "x" * 6, "y" * 20, images=["a", "b"]),
    ]
    dataset = data.load(rows)
    lengths, has_image = row_lengths(dataset, tokens_per_image=100)
    assert lengths.tolist() == [120, 40, 210] and has_image.tolist() == [True, False, True]
    lengths, has_image = row_lengths(ConcatDataset([dataset, dataset.select([1])]), tokens_per_image=16)
    assert lengths.tolist() == [36, 40, 42, 40] and has_image.tolist() == [True, False, True, False]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert row_lengths([{"messages": rows[1]["messages"]}])[0].tolist() == [40]
    assert "all 1 samples of the list are loaded once" in caplog.text
    with pytest.raises(ValueError, match="a generator has no length"):
        row_lengths(row for row in rows)


def test_a_stream_is_not_grouped() -> None:
    assert grouped_sampler((row for row in []), None) is None
