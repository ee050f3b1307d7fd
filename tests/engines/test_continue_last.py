# SPDX-License-Identifier: Apache-2.0
"""`prepare(..., continue_last=True)`: an answer that goes on where the assistant's last message ends."""

from typing import Any

import pytest

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.engines import Sampling, TransformersEngine


@pytest.fixture(scope="module")
def engine() -> Any:
    one = TransformersEngine(tiny_checkpoint(), dtype="float32")
    yield one
    one.close()


def asked(said: str | None = None) -> list[dict[str, Any]]:
    row = SceneDataset(1, seed=7, task="captions")[0]
    text = row["messages"][0]["content"].removeprefix("<image>\n")
    content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}, *([] if said is None else [{"role": "assistant", "content": said}])]


@pytest.mark.parametrize("literal", [False, True])
def test_an_answer_continues_the_last_message(engine: Any, literal: bool) -> None:
    def answer(said: str | None) -> str:
        prompt = engine.prepare(asked(said), literal=literal, continue_last=said is not None)
        text: str = engine.submit(prompt, Sampling(max_new_tokens=64))[0].result().text
        return text

    whole = answer(None)
    blanks = [place for place, character in enumerate(whole) if character == " "]
    assert len(blanks) > 4
    for cut in blanks[1::3]:
        assert whole[:cut] + answer(whole[:cut]) == whole  # the blank is kept


def test_only_the_assistants_message_can_be_continued(engine: Any) -> None:
    with pytest.raises(ValueError, match="the last message has the role 'user', so it cannot be continued"):
        engine.prepare(asked(), continue_last=True)
