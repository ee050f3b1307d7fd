# SPDX-License-Identifier: Apache-2.0
"""Runs of `fastvlm embed`: vectors as the embedder's own, errors that stop nothing, resumed runs, both outputs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transformers_fastvlm.batch import VECTOR_COLUMNS, EmbedOptions, Interrupted, JournalError, Report, run_embed
from transformers_fastvlm.data.scenes import make_scene
from transformers_fastvlm.embedding import Embedder


@pytest.fixture(scope="module")
def loaded() -> Embedder:
    return Embedder("tiny", dtype="float32", device="cpu")


class Watched:
    """The embedder, which counts what it is asked, and may be interrupted at a call."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.asked: list[int] = []
        self.interrupt_at: int | None = None

    def embed(self, inputs: Any, **options: Any) -> Any:
        if len(self.asked) == self.interrupt_at:
            raise KeyboardInterrupt
        self.asked.append(len(inputs))
        return self.embedder.embed(inputs, **options)


@pytest.fixture
def watched(loaded: Embedder) -> Watched:
    return Watched(loaded)


@pytest.fixture
def run(watched: Watched, tmp_path: Path) -> Any:
    def call(*inputs: Any, output: str = "out.npy", restart: bool = False, **options: Any) -> Report:
        chosen = EmbedOptions(**{"batch_size": 2} | options)
        load: Any = lambda: watched  # noqa: E731
        return run_embed([str(one) for one in inputs], tmp_path / output, load, chosen, about={}, restart=restart)

    return call


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    folder = tmp_path / "scenes"
    folder.mkdir()
    for index in range(5):
        make_scene(3, index).image.save(folder / f"{index}.png")
    return folder


def result(path: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    rows = [json.loads(line) for line in path.with_suffix(".ids.jsonl").read_text().splitlines()]
    assert all(tuple(row) == tuple(name for name in VECTOR_COLUMNS if name != "vector") for row in rows)
    return np.load(path), rows


def test_images_and_texts(run: Any, loaded: Embedder, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbfa star\n\nthe number 628\r\n")
    report = run(scenes, tmp_path / "texts.txt")
    assert (report.rows, report.errors) == (7, 0)
    vectors, rows = result(tmp_path / "out.npy")
    files = sorted(scenes.iterdir())
    expected = loaded.embed([*files, "a star", "the number 628"])
    assert vectors.dtype == np.float32 and np.abs(vectors - expected).max() < 1e-5
    assert [(row["source"], row["row"], row["text"]) for row in rows] == [
        *((str(file), None, None) for file in files),
        (str(tmp_path / "texts.txt"), 0, "a star"),
        (str(tmp_path / "texts.txt"), 1, "the number 628"),
    ]
    assert not (tmp_path / "out.npy.journal").exists()


def test_tables(run: Any, loaded: Embedder, scenes: Path, tmp_path: Path) -> None:
    lines = [{"image": f"{n}.png", "says": "long " * (n + 1)} for n in range(5)]
    (scenes / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (scenes / "rows.csv").write_text("says\n" + "".join(f"{line['says']}\n" for line in lines))
    images = [Image.open(scenes / line["image"]).convert("RGB") for line in lines]
    pairs = [(image, f"It {line['says']}") for image, line in zip(images, lines, strict=True)]
    cases: list[tuple[str, dict[str, Any], list[Any]]] = [
        ("rows.jsonl", {}, images),
        ("rows.jsonl", {"prompt": "It {says}"}, pairs),
        ("rows.jsonl", {"prompt": "{says}", "image_column": None}, [line["says"] for line in lines]),
        ("rows.csv", {"prompt": "{says}", "image_column": None}, [line["says"] for line in lines]),
    ]
    for number, (table, options, inputs) in enumerate(cases):
        run(scenes / table, output=f"{number}.npy", **options)
        vectors, rows = result(tmp_path / f"{number}.npy")
        assert np.abs(vectors - loaded.embed(inputs)).max() < 1e-5, table
        assert [row["row"] for row in rows] == list(range(5))


def test_errors_stop_nothing(run: Any, scenes: Path, tmp_path: Path) -> None:
    (scenes / "1.png").write_text("no image")
    (tmp_path / "texts.txt").write_bytes(b"a star\n\xff\xfe\nsee <image>\n" + b"word " * 3000)
    report = run(scenes, tmp_path / "texts.txt")
    vectors, rows = result(tmp_path / "out.npy")
    reasons = ["not an image", "not UTF-8", "1 <image>", "the model's context holds 2048"]
    assert report.errors == 4
    assert [row["error"] is None for row in rows] == [True, False, True, True, True, True, False, False, False]
    for reason, error in zip(reasons, [row["error"] for row in rows if row["error"]], strict=True):
        assert reason in error and not error.startswith("Input")
    assert (np.isnan(vectors).any(1) == [row["error"] is not None for row in rows]).all()


def test_an_array_without_any_vector(run: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("see <image>\n")
    assert run(tmp_path / "texts.txt").errors == 1
    assert result(tmp_path / "out.npy")[0].shape == (1, 0)


@pytest.mark.parametrize("output", ["out.npy", "out.parquet"])
def test_a_resumed_run_equals_one_that_was_not_stopped(
    run: Any, watched: Watched, scenes: Path, tmp_path: Path, output: str
) -> None:
    if output.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    whole = "whole" + Path(output).suffix
    run(scenes, output=whole)
    watched.asked.clear()
    watched.interrupt_at = 1
    with pytest.raises(Interrupted):
        run(scenes, output=output)
    watched.interrupt_at = None
    assert not (tmp_path / output).exists()
    with pytest.raises(JournalError, match="system None, not 'x'"):
        run(scenes, output=output, system="x")
    assert run(scenes, output=output).resumed_rows == 2
    assert watched.asked == [2, 2, 1]
    assert (tmp_path / output).read_bytes() == (tmp_path / whole).read_bytes()


def test_parquet(run: Any, loaded: Embedder, scenes: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    (scenes / "1.png").write_text("no image")
    run(scenes, output="out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == list(VECTOR_COLUMNS)
    rows = table.to_pylist()
    assert [row["vector"] is None for row in rows] == [False, True, False, False, False]
    assert np.abs(loaded.embed([scenes / "0.png"])[0] - np.asarray(rows[0]["vector"], dtype="f4")).max() < 1e-5


WRONG = {
    "out.jsonl": (["scenes"], {}, "expected a name that ends in .parquet, .npy"),
    "in the way.npy": (["scenes"], {}, "exists already"),
    "prompt.npy": (["texts.txt"], {"prompt": "x"}, "it takes no prompt"),
    "column.npy": (["rows.csv"], {"prompt": "{none}", "image_column": None}, "has no column 'none'; it has 'says'"),
    "size.npy": (["scenes"], {"batch_size": 0}, "batch_size is 0"),
}


@pytest.mark.parametrize("output", WRONG)
def test_wrong_use(run: Any, scenes: Path, tmp_path: Path, output: str) -> None:
    (tmp_path / "texts.txt").write_text("a\n")
    (tmp_path / "rows.csv").write_text("says\na\n")
    (tmp_path / "in the way.ids.jsonl").write_text("mine")
    inputs, options, expected = WRONG[output]
    with pytest.raises((ValueError, OSError), match=expected):
        run(*(tmp_path / name for name in inputs), output=output, **options)
    assert (tmp_path / "in the way.ids.jsonl").read_text() == "mine"
