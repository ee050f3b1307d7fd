# SPDX-License-Identifier: Apache-2.0
"""A data set folder reads nothing outside of itself and calls nobody, whatever is written in it."""

import json
import os
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transformers_fastvlm import data
from transformers_fastvlm.data import folders
from transformers_fastvlm.data.folders import files_below
from transformers_fastvlm.evaluation.own_data import read_own_data
from transformers_fastvlm.training import load_recipe
from transformers_fastvlm.training.recipe_loading import load_data

datasets = pytest.importorskip("datasets", reason="needs the package datasets")

SECRET = "the words outside"
OURS = "the words inside"


def row(words: str) -> dict[str, Any]:
    """A row that is right for training and for evaluation."""
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
    return {"messages": messages, "question": words, "answer": words}


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret.jsonl").write_text(lines(row(SECRET)))
    secret = datasets.Dataset.from_list([row(SECRET)])
    secret.save_to_disk(tmp_path / "secret")
    secret.to_parquet(tmp_path / "secret.parquet")
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def readme(folder: Path, entry: str) -> None:
    """Write a data set card whose configuration names files."""
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {entry}\n---\n")


# The ways in


def by_load(folder: Path) -> list[str]:
    return [sample["messages"][0]["content"] for sample in data.load(folder)]


def by_stream(folder: Path) -> list[str]:
    return [sample["messages"][0]["content"] for sample in data.load(folder, streaming=True)]


def by_check(folder: Path) -> list[str]:
    report = data.check_dataset(folder)
    assert report.ok
    return [OURS] * report.rows


def by_recipe(folder: Path) -> list[str]:
    recipe = load_recipe("finetune", [f"data.source={folder}", "output_dir=out"])

    class NoCollator:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "FastVLMDataCollator", NoCollator)
        train, _, _ = load_data(recipe.data, None)
    return [sample["messages"][0]["content"] for sample in train]


def by_evaluation(folder: Path) -> list[str]:
    return [document["question"] for document in read_own_data(folder, "exact").documents]


WAYS = [by_load, by_stream, by_check, by_recipe, by_evaluation]
Way = Callable[[Path], list[str]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "entry",
    [
        'data_files: "../secret.jsonl"',
        'data_files: "{outside}/secret.jsonl"',
        'data_files: [{split: train, path: "http://127.0.0.1:{port}/x.jsonl"}]',
        'data_files: [{split: train, path: "zip://x.jsonl::http://127.0.0.1:{port}/x.zip"}]',
        'data_dir: ".."',
    ],
)
def test_a_readme_is_not_believed(way: Way, entry: str, folder: Path, listener: socket.socket, cache: Path) -> None:
    port = str(listener.getsockname()[1])
    readme(folder, entry.replace("{outside}", str(folder.parent)).replace("{port}", port))
    with pytest.raises(ValueError, match="has no rows; expected Parquet"):
        way(folder)
    datasets.Dataset.from_list([row(OURS)]).to_parquet(folder / "rows.parquet")
    assert way(folder) == [OURS]
    assert not select.select([listener], [], [], 0)[0], "somebody was called"
    assert not cache.exists()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "filename", ["../secret/data-00000-of-00001.arrow", "{outside}/secret/data-00000-of-00001.arrow", "..", "a::http:b"]
)
def test_the_state_of_a_saved_set_is_not_believed(way: Way, filename: str, folder: Path) -> None:
    datasets.Dataset.from_list([row(OURS)]).save_to_disk(folder)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": filename.replace("{outside}", str(folder.parent))}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state\.json' names .*; expected the name of a file or folder in"):
        way(folder)


@pytest.mark.parametrize("split", ["../secret", "{outside}/secret", "file:/tmp", 7])
def test_the_splits_of_a_saved_set_are_not_believed(split: Any, folder: Path) -> None:
    split = split.replace("{outside}", str(folder.parent)) if isinstance(split, str) else split
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    for way in WAYS:
        with pytest.raises(ValueError, match=r"dataset_dict\.json' names|has no split|is incomplete|has the splits"):
            way(folder)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("linked", ["a file", "a folder", "the state", "a saved file"])
def test_links_that_lead_out_are_not_followed(way: Way, linked: str, folder: Path) -> None:
    expected = "by a symbolic link"
    if linked == "a file":
        (folder / "train.parquet").symlink_to(folder.parent / "secret.parquet")
    elif linked == "a folder":
        (folder / "below").symlink_to(folder.parent / "secret")
        expected = "has no rows"
    else:
        datasets.Dataset.from_list([row(OURS)]).save_to_disk(folder)
        name = "state.json" if linked == "the state" else "data-00000-of-00001.arrow"
        (folder / name).unlink()
        (folder / name).symlink_to(folder.parent / "secret" / name)
    with pytest.raises(ValueError, match=expected):
        way(folder)


def test_own_links_may_be_allowed(folder: Path) -> None:
    (folder / "train.jsonl").symlink_to(folder.parent / "secret.jsonl")
    with pytest.raises(ValueError, match=r"or allow it with follow_symlinks=True \(--follow-symlinks\)"):
        data.load(folder)
    assert len(data.load(folder, follow_symlinks=True)) == 1


# What a folder may hold


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["a.jsonl", "b.jsonl"], None, ["a.jsonl", "b.jsonl"]),
        (["train.json", "val.json"], None, ["train.json"]),
        (["train.json", "val.json"], "validation", ["val.json"]),
        (["train-0.parquet", "train-1.parquet", "test-0.parquet"], None, ["train-0.parquet", "train-1.parquet"]),
        (["data/test/rows.parquet", "data/train/rows.parquet"], "test", ["data/test/rows.parquet"]),
        (["a.parquet", "notes.json", "dataset_infos.json", "._a.parquet"], None, ["a.parquet"]),
        (["[1] a*?.parquet"], None, ["[1] a*?.parquet"]),
        (["a.arrow"], None, ["a.arrow"]),
        (["retrained.jsonl"], "train", ["retrained.jsonl"]),
        (
            ["val.json", "dev.json"],
            None,
            r"has no split 'train'; it has 'validation'\. Choose one with split \(--split",
        ),
        (["a.jsonl"], "train[:5]", r"has no split 'train\[:5\]'; it has 'train'"),
        (["a.csv"], None, "has no rows; expected Parquet"),
        ([], None, "has no rows"),
    ],
)
def test_files_of_rows(folder: Path, names: list[str], split: str | None, expected: list[str] | str) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = datasets.Dataset.from_list([row(name)])
        if file.suffix == ".parquet":
            rows.to_parquet(file)
        elif file.suffix == ".arrow":
            rows.save_to_disk(folder.parent / "arrow")
            os.rename(folder.parent / "arrow" / "data-00000-of-00001.arrow", file)
        else:
            file.write_text(lines(row(name)))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            data.load(folder, split=split)
        return
    loaded = data.load(folder, split=split)
    assert [sample["messages"][0]["content"] for sample in loaded] == expected
    assert all(str(folder) in sample["place"] for sample in loaded)


def test_images_begin_at_the_folder(folder: Path) -> None:
    Image.new("RGB", (9, 7)).save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A wall."}]
    (folder / "rows.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    assert data.load(folder)[0]["images"][0].size == (9, 7)


def test_much_parquet_needs_no_memory(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "IN_MEMORY", 1)
    below = folder / "a [b]"
    below.mkdir()
    datasets.Dataset.from_list([row(OURS)]).to_parquet(below / "rows*.parquet")
    datasets.Dataset.from_list([row(SECRET)]).to_parquet(below / "rows2.parquet")
    assert by_load(folder) == [OURS, SECRET]
    assert cache.exists()


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("", ValueError, "the source is ''; expected a .json or .jsonl file"),
        ("https://example.com/rows.jsonl", ValueError, "is a URL; URLs are not fetched"),
        ("zip::here", ValueError, "is a URL"),
        ("./nowhere", FileNotFoundError, "the file './nowhere' does not exist"),
        ("/no/such/folder", FileNotFoundError, "does not exist"),
        ("gone.parquet", FileNotFoundError, "does not exist"),
        ("{fifo}", ValueError, "exists, but is not a regular file"),
    ],
)
def test_names_of_nothing(folder: Path, source: str, error: type[Exception], message: str) -> None:
    os.mkfifo(folder / "fifo.jsonl")
    for way in (data.load, data.check_dataset):
        with pytest.raises(error, match=message):
            way(source.replace("{fifo}", str(folder / "fifo.jsonl")))


def test_linked_folders_are_visited_once(folder: Path) -> None:
    (folder / "b").mkdir()
    (folder / "b" / "x").touch()
    (folder / "b" / "up").symlink_to(folder)
    (folder / "a").symlink_to(folder / "b")
    (folder / "far").symlink_to(folder.parent / "secret")
    found = [os.path.relpath(file, folder) for file in files_below(str(folder))]
    assert [file for file in found if file.endswith("x")] == ["a/x"]
    assert "far/state.json" in found
    assert [os.path.relpath(file, folder) for file in files_below(str(folder), follow_links=False)] == ["b/x"]
