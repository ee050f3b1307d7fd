# SPDX-License-Identifier: Apache-2.0
"""`fastvlm embed`: what it writes and says, and its exit codes."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from transformers_fastvlm.data.scenes import make_scene
from transformers_fastvlm.embedding import Embedder

OPTIONS = ("-m", "tiny", "--device", "cpu", "--dtype", "float32")


def test_vectors_as_the_embedders(run: Any, tmp_path: Path) -> None:
    make_scene(3, 0).image.save(tmp_path / "scene.png")
    out = tmp_path / "out.npy"
    result = run("embed", tmp_path / "scene.png", "-o", out, *OPTIONS, "--pooling", "mean", "--no-normalize")
    assert result.stdout == "" and result.stderr == f"1 row in {out}\n"
    embedder = Embedder("tiny", pooling="mean", normalize=False, dtype="float32")
    assert np.allclose(np.load(out), embedder.embed([tmp_path / "scene.png"]), atol=1e-5)
    (tmp_path / "rows.csv").write_text("caption\na star\n")
    run("embed", tmp_path / "rows.csv", "-o", tmp_path / "texts.npy", *OPTIONS, "--text-column", "caption")
    assert np.allclose(np.load(tmp_path / "texts.npy"), Embedder("tiny", dtype="float32").embed(["a star"]), atol=1e-5)


def test_a_damaged_image_is_a_row_and_exit_code_1(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    make_scene(3, 0).image.save(folder / "a.png")
    (folder / "b.png").write_text("no image")
    result = run("embed", folder, "-o", tmp_path / "out.npy", *OPTIONS, "--pooling", "encoder", code=1)
    lines = result.stderr.splitlines()
    assert lines[1] == "fastvlm: 1 row without a vector:" and "b.png" in lines[2] and "not an image" in lines[2]
    rows = [json.loads(line) for line in (tmp_path / "out.ids.jsonl").read_text().splitlines()]
    assert [row["error"] is None for row in rows] == [True, False]


def test_wrong_use(run: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("caption\na star\n")
    for options, expected in (
        (("--text-column", "caption", "-p", "x"), "--text-column and --prompt cannot be combined"),
        (("--pooling", "encoder", "--text-column", "caption"), "--pooling encoder embeds images alone"),
        (("--text-column", "none"), "has no column 'none'"),
    ):
        result = run("embed", tmp_path / "rows.csv", "-o", tmp_path / "out.npy", *OPTIONS, *options, code=2)
        assert expected in result.stderr
