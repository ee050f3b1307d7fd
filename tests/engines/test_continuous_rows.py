# SPDX-License-Identifier: Apache-2.0
"""Two hundred scenes that arrive at random: each answer is the one that its question gets alone."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.engines import Answer, Request, Sampling, TransformersEngine
from transformers_fastvlm.inference.image_table import FIRST_ID, SLOT, ImageTable

SCENES = 200


def asked(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a scene's question as a conversation."""
    (image,) = row["images"]
    text = row["messages"][0]["content"].removeprefix("<image>\n")
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()
    one = TransformersEngine(model, AutoProcessor.from_pretrained(tiny_checkpoint()), batch_size=6)
    yield one
    one.close()


@pytest.fixture(scope="module")
def questions() -> list[tuple[list[dict[str, Any]], Sampling]]:
    """A third greedy, a third sampled by a seed of its own, a third longer and with a text that ends it."""
    scenes = SceneDataset(SCENES, seed=91)
    kinds = [
        {"max_new_tokens": 8},
        {"max_new_tokens": 12, "temperature": 1.5},
        {"max_new_tokens": 24, "temperature": 2.0, "top_p": 0.9, "stop": ("e",)},
    ]
    return [(asked(scenes[row]), Sampling(seed=row, **kinds[row % 3])) for row in range(SCENES)]


def key(answer: Answer) -> tuple[Any, ...]:
    return answer.text, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens


def test_answers_do_not_depend_on_who_runs_beside_them(engine, questions) -> None:
    alone = [key(engine.stream(*one).result()) for one in questions]
    assert len(set(alone)) > 40
    order = random.Random(7).sample(range(SCENES), SCENES)
    left: list[int] = []

    def ask(index: int) -> tuple[int, Request]:
        request = engine.stream(*questions[index])
        if index % 10 == 3:  # leaves before, within or after its answer
            request.cancel()
            left.append(index)
        return index, request

    with ThreadPoolExecutor(4) as pool:
        found = {index: request.result() for index, request in pool.map(ask, order)}
    assert [index for index in range(SCENES) if index not in left and key(found[index]) != alone[index]] == []
    assert len(left) == SCENES // 10
    assert threading.active_count() < 10 and not engine._rows.running and not engine._queue


def test_seeds(engine, questions) -> None:
    """Rows of one prompt differ by their seeds only."""
    prompt = engine.prepare(questions[0][0])
    samplings = [Sampling(seed=seed, temperature=2.0, max_new_tokens=16) for seed in range(12)]
    together = [key(request.result()) for request in engine.submit(prompt, *samplings)]
    assert len(set(together)) > 3
    assert together == [key(engine.stream(questions[0][0], one).result()) for one in samplings]


class Encodes:
    """A model whose features say which image they are of."""

    device = torch.device("cpu")

    def get_image_features(self, pixel_values: torch.Tensor, **_: Any) -> Any:
        rows = [torch.full((int(one[0, 0, 1]), 2), float(one[0, 0, 0])) for one in pixel_values]
        return type("Output", (), {"pooler_output": rows})


def stored(table: ImageTable, number: int, tokens: int) -> Any:
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[0, 0, 0, :2] = torch.tensor([number, tokens])
    return table.add(str(number).encode(), tokens, {"pixel_values": pixels})


def test_features_are_found_by_their_ids() -> None:
    table, embedding = ImageTable(), torch.nn.Embedding(8, 2)
    small, large = stored(table, 1, 3), stored(table, 2, SLOT + 5)
    table.encode(Encodes(), [small, large])
    ids = [4, *small.ids, 5, *large.ids, 6, large.ids[-1], small.ids[0]]
    found = table.embed(torch.tensor([ids]), embedding)[0]
    assert torch.equal(found[[0, 4, -3]], embedding.weight[[4, 5, 6]])
    assert found[1:4].unique().tolist() == [1.0] and found[5 : 5 + SLOT + 5].unique().tolist() == [2.0]
    assert found[-2:].tolist() == [[2.0, 2.0], [1.0, 1.0]]
    assert table.find(b"1") is small and table.find(b"3") is None
    assert small.ids[0] >= FIRST_ID and not set(small.ids) & set(large.ids)


def test_ids_in_use_are_not_given_again() -> None:
    table = ImageTable(kept_tokens=0, last_id=FIRST_ID + 4 * SLOT - 1)
    first, second = stored(table, 1, SLOT), stored(table, 2, 2 * SLOT)
    third = stored(table, 3, 1)
    with pytest.raises(ValueError, match="4 of 4 slots"):
        stored(table, 4, 1)
    del second
    fourth = stored(table, 4, 1)
    assert table.rounds and len({image.ids[0] for image in (first, third, fourth)}) == 3


def test_equal_images_are_one(engine) -> None:
    def prepared(image: Image.Image) -> Any:
        content = [{"type": "image", "image": image}, {"type": "text", "text": "?"}]
        return engine.prepare([{"role": "user", "content": content}]).inputs["images"][0]

    red = prepared(Image.new("RGB", (40, 30), "red"))
    assert prepared(Image.new("RGB", (40, 30), "red")) is red
    for other in (Image.new("RGB", (30, 40), "red"), Image.new("L", (40, 30)), Image.new("RGB", (40, 30), "blue")):
        assert prepared(other) is not red
