# SPDX-License-Identifier: Apache-2.0
"""Rows of an evaluation join and leave the model one by one: a long answer holds up no other, and all are kept."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transformers_fastvlm.engines import Sampling, TransformersEngine
from transformers_fastvlm.evaluation.lmms_model import FastVLM

pytest.importorskip("lmms_eval", reason="the harness is lmms-eval")
pytestmark = pytest.mark.filterwarnings("default")

LONG, SHORT = 600, 2
ROWS = 24
QUESTION = "What is in image"


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("qwen2_tied"))


@pytest.fixture
def engine(model: str) -> Iterator[TransformersEngine]:
    """An engine whose answers end by their length only."""
    one = TransformersEngine(model, dtype="float32", device="cpu", batch_size=4)
    one.model.generation_config.eos_token_id = None
    yield one
    one.close()


def image_of(row: int) -> Image.Image:
    return Image.new("RGB", (40 + row, 30), (row * 10, 90, 200))


def messages_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    text = {"type": "text", "text": f"{QUESTION} {document['row']}?"}
    return [{"role": "user", "content": [{"type": "image", "url": image_of(document["row"])}, text]}]


def requests_of() -> list[Any]:
    """Return one request with a long answer, and then those with short ones."""
    from lmms_eval.api.instance import Instance

    return [
        Instance(
            request_type="generate_until",
            arguments=(f"{QUESTION} {row}?", messages_of, {"max_new_tokens": length}, row, task, "test"),
            idx=0,
            metadata={"task": task, "doc_id": row, "repeats": 1},
        )
        for task, length, rows in (("long", LONG, 1), ("short", SHORT, ROWS))
        for row in range(rows)
    ]


def loaded(model: str, engine: TransformersEngine, **options: Any) -> Any:
    from datasets import Dataset

    found = FastVLM(model, engine, batch_size=4, **options)
    table = Dataset.from_list([{"row": row} for row in range(ROWS)])
    found.task_dict = {"long": {"test": table}, "short": {"test": table}}
    return found


def test_a_long_answer_holds_up_no_other_and_all_are_kept_over_a_stop(
    model: str, engine: TransformersEngine, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"

    def stop(done: int, total: int) -> None:
        assert total == ROWS + 1
        if done == ROWS:  # all but the long one
            raise KeyboardInterrupt

    stopped = loaded(model, engine, journal=journal, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.generate_until(requests_of())
    stopped._journal.close()
    written = journal.read_bytes()
    counts = [values[2] for line in written.splitlines()[1:] for values in json.loads(line).values()]
    assert counts == [SHORT] * ROWS, "the long answer is asked first, and no other waits for it"

    resumed = loaded(model, engine, journal=journal)
    results = resumed.generate_until(requests_of())
    assert resumed.reused == ROWS and journal.read_bytes().startswith(written)
    assert [one.token_counts.output_tokens for one in results] == [LONG] + [SHORT] * ROWS
    for row, result in enumerate(results[1:]):
        content = messages_of({"row": row})[0]["content"]
        content[0] = {"type": "image", "image": image_of(row)}
        (alone,) = engine.generate([[{"role": "user", "content": content}]], Sampling(max_new_tokens=SHORT))
        assert result.text == alone.text, row
    resumed.clean()


def test_answers_before_a_row_that_fails_are_kept(model: str, engine: TransformersEngine, tmp_path: Path) -> None:
    requests = requests_of()[1:]
    text, _, options, *where = requests[9].arguments

    def too_long(document: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": "long " * 40_000}]}]

    requests[9].arguments = (text, too_long, options, *where)
    failing = loaded(model, engine, journal=tmp_path / "journal.jsonl")
    with pytest.raises(ValueError, match=r"^task short, row 9: .* fills the model's context"):
        failing.generate_until(requests)
    kept = len(failing._journal)
    failing._journal.close()
    again = loaded(model, engine, journal=tmp_path / "journal.jsonl")
    assert len(again.generate_until(requests_of()[1:])) == ROWS
    asked_before = sorted(range(ROWS), key=lambda row: (-len(str(row)), row)).index(9)
    assert again.reused == kept == asked_before
    again.clean()
