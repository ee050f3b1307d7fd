# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss and recall, against their definitions in the papers."""

import math

import pytest
import torch

from transformers_fastvlm.embedding import contrastive_loss, recall


def unit(rows: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_the_loss_is_the_mean_of_both_directions() -> None:
    first, second = unit(5, 0), unit(5, 1)
    scores = (3.0 * first @ second.T).tolist()
    expected = 0.0
    for index in range(5):
        row, column = scores[index], [line[index] for line in scores]
        for line in (row, column):
            expected -= math.log(math.exp(scores[index][index]) / sum(map(math.exp, line))) / 10
    assert float(contrastive_loss(first, second, 3.0)) == pytest.approx(expected, rel=1e-5)


def test_rows_of_one_group_are_no_wrong_answers() -> None:
    first, second = unit(4, 0), unit(4, 1)
    twice = torch.cat((first, first[:1])), torch.cat((second, second[:1]))
    groups = torch.tensor([0, 1, 2, 3, 0])
    alone = contrastive_loss(first, second, 2.0)
    assert not torch.isclose(contrastive_loss(*twice, 2.0), alone)
    scores = 2.0 * twice[0] @ twice[1].T
    scores[0, 4] = scores[4, 0] = -math.inf
    rows = torch.arange(5)
    expected = sum(torch.nn.functional.cross_entropy(one, rows) for one in (scores, scores.T)) / 2
    assert torch.isclose(contrastive_loss(*twice, 2.0, groups), expected)


def test_the_scale_can_be_trained() -> None:
    scale = torch.tensor(1.0, requires_grad=True)
    contrastive_loss(unit(4, 0), unit(4, 0), scale).backward()
    assert scale.grad is not None and float(scale.grad) < 0


def test_matrices_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the vectors are \(4, 8\) and \(5, 8\)"):
        contrastive_loss(unit(4, 0), unit(5, 0), 1.0)


def test_recall() -> None:
    documents = torch.eye(4)
    queries = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.3, 0.2, 0.1, 0], [0.1, 0.2, 0.3, 0]])
    assert recall(queries, documents, (1, 2, 3, 4)) == {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}
    equal = torch.ones(4, 4)
    assert recall(equal, equal, (1, 4)) == {1: 0.0, 4: 1.0}, "vectors that are all the same find nothing"
