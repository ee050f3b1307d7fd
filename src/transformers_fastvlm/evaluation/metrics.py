# SPDX-License-Identifier: Apache-2.0
"""The metrics by name; each one is lmms-eval's function."""

import functools
from collections.abc import Callable, Sequence

__all__ = ["METRICS", "check_answers", "score"]

METRICS = {
    "exact": "equal to one of the answers, letter for letter; surrounding white space is ignored",
    "letter": "the option's letter, A to H, found in the answer as for RealWorldQA",
    "vqa": "VQA accuracy, as for VQAv2 and TextVQA: the leave-one-out mean of min(1, matches / 3)",
    "anls": "average normalised Levenshtein similarity, 0 below 0.5, as for DocVQA and InfoVQA",
    "relaxed": "numbers within 5 %, other answers equal, ignoring case, as for ChartQA",
    "substring": "contains one of the answers, ignoring case, as for OCRBench",
}
"""Names and descriptions of the metrics."""

_LETTERS = "ABCDEFGH"
_FEWEST_FOR_VQA = 4


def score(metric: str, answers: Sequence[str], given: str) -> float:
    """Return the score of an answer, from 0 to 1.

    Args:
        metric: one of `METRICS`.
        answers: the reference answers, at least one. For "vqa" they come from different annotators, usually 10.
        given: the model's answer.

    Raises:
        ValueError: the metric is unknown.
        ImportError: lmms-eval is not installed.
    """
    return float(_functions()[_known(metric)](list(answers), given.strip()))


def check_answers(metric: str, answers: Sequence[str]) -> None:
    """Raise ValueError if a metric cannot use these reference answers, or is unknown."""
    if _known(metric) == "letter" and any(len(a.strip()) != 1 or a.strip() not in _LETTERS for a in answers):
        raise ValueError(f"the answers are {list(answers)}; the metric letter expects capital letters from A to H.")
    if metric == "vqa" and len(answers) < _FEWEST_FOR_VQA:
        raise ValueError(
            f"there are {len(answers)} answers, but the metric vqa leaves one out and needs three others that agree: "
            f"with fewer than {_FEWEST_FOR_VQA} no answer scores 1. Use exact, anls or relaxed."
        )


def _known(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; expected one of {', '.join(METRICS)}.")
    return metric


@functools.cache
def _functions() -> dict[str, Callable[[list[str], str], float]]:
    from .tasks import import_harness

    import_harness()
    from lmms_eval.api.metrics import anls, exact_match_hf_evaluate
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    def exact(answers: list[str], given: str) -> float:
        pairs = [{"predictions": [given], "references": [answer.strip()]} for answer in answers]
        return max(float(exact_match_hf_evaluate(**pair)["exact_match"]) for pair in pairs)

    def letter(answers: list[str], given: str) -> float:
        return float(extract_mcq_answer(given, list(_LETTERS)) in [answer.strip() for answer in answers])

    def vqa(answers: list[str], given: str) -> float:
        document = {"answers": answers, "question_id": 0}
        return float(textvqa_process_results(document, [given])["exact_match"])

    def similarity(answers: list[str], given: str) -> float:
        return float(anls(references=answers, predictions=[given])["anls"])

    def relaxed(answers: list[str], given: str) -> float:
        return float(any(relaxed_correctness(given, answer.strip()) for answer in answers))

    def substring(answers: list[str], given: str) -> float:
        document = {"answer": answers, "dataset": "", "question_type": ""}
        return float(ocrbench_process_results(document, [given])["ocrbench_accuracy"]["score"])

    return {
        "exact": exact,
        "letter": letter,
        "vqa": vqa,
        "anls": similarity,
        "relaxed": relaxed,
        "substring": substring,
    }
