# SPDX-License-Identifier: Apache-2.0
"""Text as it comes is the text of all tokens, up to a stop string."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedConfig

from transformers_fastvlm.engines.answer_text import AnswerText


@pytest.fixture(params=["qwen2_tied", "llama"])
def tokenizer(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint(request.param), config=PreTrainedConfig())


def pieces(tokenizer: Any, tokens: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], AnswerText]:
    text = AnswerText(tokenizer, stops)
    found = []
    for token in tokens:
        found.append(text.add(token))
        if text.stopped:
            break
    return [*found, text.finish()], text


def test_pieces_are_the_text_in_whole_characters(tokenizer: Any) -> None:
    written = "Grüße, 世界! 🐈‍⬛ two  spaces\nand a line. " * 3
    tokens = tokenizer.encode(written, add_special_tokens=False)
    found, _ = pieces(tokenizer, tokens)
    assert "".join(found) == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert "\ufffd" not in "".join(found)
    assert sum(bool(piece) for piece in found) > len(tokens) // 4  # as it comes, not at the end


def test_any_tokens_are_what_decoding_gives(tokenizer: Any) -> None:
    numbers = random.Random(5)
    for _ in range(20):
        tokens = [numbers.randrange(len(tokenizer)) for _ in range(30)]
        found, _ = pieces(tokenizer, tokens)
        assert "".join(found) == tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_a_stop_string_ends_the_answer_wherever_it_lies(tokenizer: Any) -> None:
    tokens = tokenizer.encode("one two three two four", add_special_tokens=False)
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    for start in range(len(whole)):
        for end in range(start + 1, min(start + 6, len(whole)) + 1):
            stop = whole[start:end]
            found, text = pieces(tokenizer, tokens, ("not there", stop))
            assert text.stopped
            assert "".join(found) == whole[: whole.index(stop)].strip(), stop


def test_white_space_around_an_answer_is_left_out(tokenizer: Any) -> None:
    tokens = tokenizer.encode(" \n  red  and blue ", add_special_tokens=False)
    found, _ = pieces(tokenizer, tokens)
    assert "".join(found) == "red  and blue"
    assert "".join(pieces(tokenizer, tokens, ("  and",))[0]) == "red"
    assert "".join(pieces(tokenizer, tokens, (" ",))[0]) == ""  # what ends an answer is looked for in all of it


def test_what_only_looks_like_a_stop_string_is_kept_back_and_then_said(tokenizer: Any) -> None:
    tokens = tokenizer.encode("one two three", add_special_tokens=False)
    found, text = pieces(tokenizer, tokens, ("one two three four",))
    assert not text.stopped
    assert found[:-1] == [""] * len(tokens) and found[-1] == tokenizer.decode(tokens, skip_special_tokens=True)
