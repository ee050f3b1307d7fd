# SPDX-License-Identifier: Apache-2.0
"""The journal of answers: found again by all that they depend on."""

import json
from pathlib import Path

from transformers_fastvlm.evaluation.eval_journal import AnswerJournal, Journalled, answer_key


def answer(text: str) -> Journalled:
    return Journalled(text, 20, 2, 0.25)


def test_answers_are_found_again(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path / "journal")
    journal.append([("a", answer("one")), ("b", answer("zwei\nñ \ud83d"))])
    assert journal.get("a") == answer("one")
    journal.close()
    again = AnswerJournal(tmp_path / "journal")
    assert (len(again), again.get("b"), again.get("c")) == (2, answer("zwei\nñ \ud83d"), None)
    again.close()


def test_a_key_depends_on_all_that_an_answer_depends_on() -> None:
    whole = ({"files": {"config.json": "1"}, "dtype": "auto"}, "chartqa", 3, "What is it?", {"max_new_tokens": 16})
    others = (
        {"files": {"config.json": "2"}, "dtype": "auto"},
        "docvqa_val",
        4,
        "What is that?",
        {"max_new_tokens": 32},
    )
    keys = {answer_key(*whole)} | {
        answer_key(*(*whole[:at], other, *whole[at + 1 :])) for at, other in enumerate(others)
    }
    assert len(keys) == 6
    assert answer_key(*whole) == answer_key(json.loads(json.dumps(whole[0])), *whole[1:])
