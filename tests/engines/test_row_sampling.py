# SPDX-License-Identifier: Apache-2.0
"""A row's tokens follow from its own options and scores, whatever rows run beside it."""

import pytest
import torch

from transformers_fastvlm.engines import Sampling
from transformers_fastvlm.engines.row_sampling import RowChooser, RowSampling, choose_tokens

STEPS = 12
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=2.0, top_p=0.7, seed=3),
    Sampling(temperature=0.3, seed=2**64 - 1),
]


def scores_of(row: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits (vocabulary,) of a row that do not depend on its batch."""
    return torch.randn(50, generator=torch.Generator().manual_seed(1000 * row + step)).to(dtype)


def alone(row: int, sampling: Sampling) -> list[int]:
    chooser = RowChooser(sampling)
    return [choose_tokens([chooser], scores_of(row, step)[None])[0] for step in range(STEPS)]


def test_rows_that_join_and_leave_choose_as_alone() -> None:
    expected = [alone(row, sampling) for row, sampling in enumerate(SAMPLINGS)]
    choosers = [RowChooser(sampling) for sampling in SAMPLINGS]
    chosen: list[list[int]] = [[] for _ in SAMPLINGS]
    for moment in range(3 * STEPS):
        rows = [row for row in range(len(SAMPLINGS)) if moment >= 2 * row and len(chosen[row]) < STEPS]
        rows.sort(key=lambda row: (row * 7 + moment) % 5)  # the order in the batch changes too
        if rows:
            scores = torch.stack([scores_of(row, len(chosen[row])) for row in rows])
            tokens = choose_tokens([choosers[row] for row in rows], scores)
            for row, token in zip(rows, tokens, strict=True):
                chosen[row].append(token)
    assert chosen == expected


def test_a_seed_repeats_its_numbers_and_another_does_not() -> None:
    sampling = Sampling(temperature=2.0, seed=1)
    assert alone(0, sampling) == alone(0, sampling)
    assert alone(0, sampling) != alone(0, Sampling(temperature=2.0, seed=2))


def test_numbers_are_those_of_the_rows_generator() -> None:
    """Inverse transform sampling: the first token whose cumulative probability exceeds the number."""
    scores = scores_of(0, 0)
    probabilities, order = scores.softmax(-1).sort(descending=True, stable=True)
    number = torch.rand(1, generator=torch.Generator().manual_seed(5))
    place = int((probabilities.cumsum(-1) <= number).sum())
    assert choose_tokens([RowChooser(Sampling(temperature=1.0, seed=5))], scores[None]) == [int(order[place])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_choosing_leaves_the_scores_and_the_global_random_state_alone(dtype: torch.dtype) -> None:
    scores = torch.stack([scores_of(row, 0, dtype) for row in range(len(SAMPLINGS))])
    before, state = scores.clone(), torch.get_rng_state()
    choose_tokens([RowChooser(sampling) for sampling in SAMPLINGS], scores)
    assert torch.equal(scores, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_ended_row_draws_no_numbers() -> None:
    chooser = RowChooser(Sampling(temperature=1.0, seed=1))
    assert chooser.generator is not None
    chooser.ended = True
    state = chooser.generator.get_state()
    choose_tokens([chooser], scores_of(0, 0)[None])
    assert torch.equal(chooser.generator.get_state(), state)


def test_the_logits_processor_chooses_the_same_tokens() -> None:
    choosers = [RowChooser(sampling) for sampling in SAMPLINGS]
    processor = RowSampling([RowChooser(sampling) for sampling in SAMPLINGS])
    for step in range(STEPS):
        scores = torch.stack([scores_of(row, step) for row in range(len(SAMPLINGS))])
        assert processor(None, scores).argmax(-1).tolist() == choose_tokens(choosers, scores)
