# SPDX-License-Identifier: Apache-2.0
"""Samples from data sets of Hugging Face's `datasets`: lazily, and as they stream in."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from transformers_fastvlm import FastVLMProcessor, data
from transformers_fastvlm.data import FastVLMDataCollator, ImageError, SampleError

datasets = pytest.importorskip("datasets", reason="needs the package datasets")

# Python 3.12 and newer; the workers of a data loader are forked by default.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes"),  # on a machine of one core
]

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def numbered_image(number: int) -> Image.Image:
    return Image.new("RGB", (10 + number, 8), (number, 0, 0))


def rows(count: int = 6) -> list[Row]:
    """Every third row is text alone."""
    return [
        {
            "id": f"r{number}",
            "messages": [
                {"role": "user", "content": "Hi?" if number % 3 == 2 else "<image>\nWhat?"},
                {"role": "assistant", "content": f"It is {number}."},
            ],
            "images": [] if number % 3 == 2 else [{"bytes": encoded(numbered_image(number)), "path": None}],
        }
        for number in range(count)
    ]


def features(image: Any = None) -> Any:
    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(image or datasets.Image()),
        }
    )


@pytest.fixture
def hub() -> Any:
    return datasets.Dataset.from_list(rows(), features=features())


def check_samples(samples: list[Row], numbers: list[int]) -> None:
    assert [sample["id"] for sample in samples] == [f"r{number}" for number in numbers]
    for sample, number in zip(samples, numbers, strict=True):
        assert sample["messages"] == rows()[number]["messages"]
        expected = [] if number % 3 == 2 else [numbered_image(number)]
        assert len(sample["images"]) == len(expected)
        for image, original in zip(sample["images"], expected, strict=True):
            assert isinstance(image, Image.Image) and np.array_equal(image, original)


def test_a_dataset(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = data.load(hub)
    check_samples(list(dataset), list(range(6)))
    assert dataset[1]["place"] == "the Dataset, row 1 (id 'r1')"
    check_samples(list(data.load(hub.select([4, 0, 5]))), [4, 0, 5])
    check_samples([pickle.loads(pickle.dumps(dataset))[3]], [3])
    loader = DataLoader(dataset, 2, num_workers=2, collate_fn=list)
    check_samples([sample for batch in loader for sample in batch], list(range(6)))
    # The words are read without the images' bytes.
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    lengths, has_image = data.row_lengths(dataset)
    assert has_image.tolist() == [True, True, False] * 2 and lengths[0] > 256 > lengths[2]


def test_a_dataset_of_parts(hub: Any) -> None:
    """As TRL's examples have them: every part has every key."""
    kinds = {key: datasets.Value("string") for key in ("type", "text")} | {"index": datasets.Value("int64")}
    content = [
        {"type": "text", "text": "What?", "index": None},
        {"type": "image", "text": None, "index": 0},
    ]
    answer = [{"type": "text", "text": "This.", "index": None}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    parts = datasets.Dataset.from_list(
        [{"messages": messages, "images": [numbered_image(0)]}],
        features=datasets.Features(
            {
                "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(kinds)}),
                "images": datasets.List(datasets.Image()),
            }
        ),
    )
    sample = data.load(parts)[0]
    assert [turn["content"] for turn in sample["messages"]] == ["<image>\nWhat?", "This."]
    assert np.array_equal(sample["images"][0], numbered_image(0))


def test_llava_columns_and_one_image(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A wall."}]
    numbered_image(1).save(tmp_path / "a.png")
    columns = {"conversations": [turns, turns], "image": ["a.png", "../a.png"]}
    dataset = data.load(datasets.Dataset.from_dict(columns), tmp_path)
    assert np.array_equal(dataset[0]["images"][0], numbered_image(1))
    with pytest.raises(SampleError, match=r"the Dataset, row 1: the image '\.\./a\.png' leaves the image folder"):
        dataset[1]
    lazy = datasets.Dataset.from_dict({**columns, "image": [str(tmp_path / "a.png")] * 2})
    lazy = lazy.cast_column("image", datasets.Image())
    assert np.array_equal(data.load(lazy, tmp_path)[0]["images"][0], numbered_image(1))
    with pytest.raises(SampleError, match="no image folder was given"):
        data.load(lazy)[0]


def test_from_disk_and_from_files(hub: Any, tmp_path: Path) -> None:
    hub.save_to_disk(tmp_path / "saved")
    check_samples(list(data.load(tmp_path / "saved")), list(range(6)))
    datasets.DatasetDict({"train": hub, "test": hub.select([1])}).save_to_disk(tmp_path / "splits")
    check_samples(list(data.load(tmp_path / "splits", split="test")), [1])
    with pytest.raises(ValueError, match="has no split 'dev'; it has 'train', 'test'"):
        data.load(tmp_path / "splits", split="dev")
    (tmp_path / "repository").mkdir()
    hub.to_parquet(tmp_path / "repository" / "train.parquet")
    check_samples(list(data.load(str(tmp_path / "repository"), limit=2)), [0, 1])
    check_samples(list(data.load(str(tmp_path / "repository"), streaming=True)), list(range(6)))
    check_samples(list(data.load(tmp_path / "saved", streaming=True)), list(range(6)))


@pytest.mark.parametrize("known", [True, False])
def test_a_stream(hub: Any, known: bool) -> None:
    stream = hub.to_iterable_dataset(num_shards=2) if known else datasets.IterableDataset.from_generator(rows)
    samples = data.load(stream, streaming=True)
    assert isinstance(samples, datasets.IterableDataset) and isinstance(samples, torch.utils.data.IterableDataset)
    check_samples(list(samples), list(range(6)))
    check_samples(list(data.load(stream, streaming=True, limit=2)), [0, 1])
    assert next(iter(samples))["place"] == "the stream, row 0 (id 'r0')"


def test_a_stream_in_workers_and_resumed(hub: Any) -> None:
    stream = data.load(hub.to_iterable_dataset(num_shards=2), streaming=True)
    loader = DataLoader(stream, 1, num_workers=2, collate_fn=list)
    found = sorted((batch[0] for batch in loader), key=lambda sample: sample["id"])
    check_samples(found, list(range(6)))
    iterator = iter(stream)
    first = [next(iterator) for _ in range(2)]
    state = stream.state_dict()
    rest = list(iterator)
    stream.load_state_dict(state)
    assert [sample["id"] for sample in stream] == [sample["id"] for sample in rest]
    check_samples(first + rest, list(range(6)))


def test_a_shuffled_stream(hub: Any) -> None:
    stream = data.load(hub.to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=4), streaming=True)

    def order(epoch: int) -> list[str]:
        stream.set_epoch(epoch)
        return [sample["id"] for sample in stream]

    assert sorted(order(0)) == [f"r{number}" for number in range(6)]
    assert order(0) == order(0) != order(1)


def test_a_stream_of_a_training_run(hub: Any, checkpoint: Callable[[str], Path]) -> None:
    collator = FastVLMDataCollator(FastVLMProcessor.from_pretrained(checkpoint("qwen2_tied")))
    loader = DataLoader(data.load(hub.to_iterable_dataset(), streaming=True), 3, collate_fn=collator)
    batches = list(loader)
    assert [batch["pixel_values"].shape[0] for batch in batches] == [2, 2]


def broken() -> list[Row]:
    wrong = rows()
    wrong[1]["images"][0]["bytes"] = wrong[1]["images"][0]["bytes"][:40]
    wrong[4]["images"][0]["bytes"] = b""
    return wrong


def test_bad_images(caplog: pytest.LogCaptureFixture) -> None:
    hub = datasets.Dataset.from_list(broken(), features=features())
    with pytest.raises(ImageError, match=r"the Dataset, row 1 \(id 'r1'\): the image"):
        data.load(hub)[1]
    kept = data.load(hub, on_bad_image="skip")
    check_samples(list(kept), [0, 2, 3, 5])
    assert [error.place.row for error in kept.skipped] == [1, 4]
    stream = hub.to_iterable_dataset()
    with pytest.raises(ImageError, match=r"the stream, row 1 \(id 'r1'\): the image"):
        list(data.load(stream, streaming=True))
    caplog.clear()
    check_samples(list(data.load(stream, streaming=True, on_bad_image="skip")), [0, 2, 3, 5])
    assert "Skipped, 2 so far in this process: the stream, row 4 (id 'r4'): the image is empty" in caplog.text


def test_other_errors_of_a_stream(hub: Any) -> None:
    def turned(row: Row) -> Row:
        return {"messages": row["messages"][::-1]}

    stream = data.load(hub.to_iterable_dataset().map(turned), streaming=True, on_bad_image="skip")
    with pytest.raises(SampleError, match=r"row 0 \(id 'r0'\): the conversation starts with the assistant"):
        next(iter(stream))


def test_checking(hub: Any) -> None:
    report = data.check_dataset(datasets.Dataset.from_list(broken(), features=features()), num_workers=1)
    assert (report.rows, report.images, report.text_only) == (6, 2, 2)
    assert [(problem.row, problem.id, problem.kind) for problem in report.problems] == [
        (1, "r1", "image"),
        (4, "r4", "image"),
    ]
    json.dumps(report.to_dict())


def test_samples_as_a_dataset(hub: Any) -> None:
    """What TRL takes: any subset, the order, workers, and nothing made before it is asked for."""
    samples = data.load([*rows(), {"id": "broken", "messages": []}])
    made = samples.to_datasets()
    assert isinstance(made, datasets.Dataset) and len(made) == 7
    check_samples(list(made.select(range(6))), list(range(6)))
    check_samples([made[4]], [4])
    loader = DataLoader(made.select([5, 0, 3]), 2, num_workers=1, collate_fn=list)
    check_samples([sample for batch in loader for sample in batch], [5, 0, 3])
    with pytest.raises(SampleError, match=r"row 6 \(id 'broken'\)"):
        made[6]


def test_sources_that_do_not_fit(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    for source, options, expected in (
        (hub.to_iterable_dataset(), {}, "pass streaming=True"),
        (hub, {"streaming": True}, r"\(Dataset\); expected a data set to stream"),
        (7, {}, r"the source is '7' \(int\); expected a .json or .jsonl file, a list of rows"),
        (tmp_path / "a.json", {"streaming": True}, "is always read row by row"),
        (hub.to_iterable_dataset(), {"streaming": True, "exclude": [1]}, "need all rows at once"),
    ):
        with pytest.raises(ValueError, match=expected):
            data.load(source, **options)
    with pytest.raises(FileNotFoundError, match=r"the file .*gone.jsonl' does not exist"):
        data.load(tmp_path / "gone.jsonl")
