# SPDX-License-Identifier: Apache-2.0
"""Each metric, as the command calls it, gives the score that was worked out by hand in metric_cases.tsv."""

from collections import Counter
from pathlib import Path

import pytest

from transformers_fastvlm.evaluation.metrics import METRICS, check_answers, score

pytest.importorskip("lmms_eval", reason="the metrics are lmms-eval's")
pytestmark = pytest.mark.filterwarnings("default")

TABLE = Path(__file__).parent / "metric_cases.tsv"


def cases() -> list[tuple[str, list[str], str, float, str]]:
    found = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        metric, answers, given, expected, why = line.replace("\\n", "\n").split("\t")
        found.append((metric, answers.split(" | "), given, float(expected), why))
    return found


def test_there_are_thirty_cases_of_each_metric() -> None:
    counts = Counter(metric for metric, *_ in cases())
    assert set(counts) == set(METRICS)
    assert min(counts.values()) >= 30


@pytest.mark.parametrize(("metric", "answers", "given", "expected", "why"), cases())
def test_score_is_that_worked_out_by_hand(
    metric: str, answers: list[str], given: str, expected: float, why: str
) -> None:
    check_answers(metric, answers)
    before = list(answers)
    assert score(metric, answers, given) == pytest.approx(expected, abs=1e-6), why
    assert answers == before, "the answers were changed"
