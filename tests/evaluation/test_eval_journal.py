# SPDX-License-Identifier: Apache-2.0
"""The journal of answers: whole batches or nothing, whatever happens, and nothing of another run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from transformers_fastvlm.evaluation.eval_journal import AnswerJournal, Journalled, answer_key, model_identity


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


def test_a_batch_that_was_cut_off_at_any_byte_is_dropped_and_the_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = AnswerJournal(path)
    journal.append([("a", answer("one"))])
    first = path.stat().st_size
    journal.append([("b", answer("two")), ("c", answer("three"))])
    journal.close()
    content = path.read_bytes()
    for end in range(first, len(content)):
        path.write_bytes(content[:end])
        cut = AnswerJournal(path)
        assert (len(cut), cut.get("b")) == (1, None), end
        cut.append([("d", answer("four"))])
        cut.close()
        whole = AnswerJournal(path)
        assert len(whole) == 2, end
        whole.close()


def test_damage_before_the_end_is_an_error_that_says_where(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b'{"a": ["one", 1, 1, 0.5]}\nsomething else\n{"b": ["two", 1, 1, 0.5]}\n')
    with pytest.raises(ValueError, match=r"damaged at byte 26.*Delete it to begin again"):
        AnswerJournal(path)


def test_two_runs_cannot_share_it(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    journal = AnswerJournal(tmp_path / "journal")
    with pytest.raises(ValueError, match="in use by another evaluation"):
        AnswerJournal(tmp_path / "journal")
    journal.close()
    AnswerJournal(tmp_path / "journal").close()


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


def test_a_checkpoint_is_known_by_the_content_of_its_files(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint("qwen2_tied"), tmp_path / "copy"))
    identity = model_identity(str(copy))
    assert identity == model_identity(str(checkpoint("qwen2_tied")))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = model_identity(str(copy))
    assert {name for name in identity if identity[name] != changed[name]} == {"model.safetensors"}


def test_a_checkpoint_of_the_hub_is_known_by_its_commit(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(hub_cache / "hub"))
    assert model_identity("fastvlm/tiny") == {"commit": "0123456789abcdef0123456789abcdef01234567"}
