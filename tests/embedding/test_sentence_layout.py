# SPDX-License-Identifier: Apache-2.0
"""The directory for sentence-transformers: read by this package, refused options; tests/extras loads it with theirs."""

import json
from pathlib import Path

import numpy as np
import pytest

from transformers_fastvlm.data.scenes import make_scene
from transformers_fastvlm.embedding import Embedder, save_for_sentence_transformers


def test_the_directory_is_a_whole_checkpoint(tmp_path: Path) -> None:
    embedder = Embedder("tiny", dtype="float32", size=320)
    out = save_for_sentence_transformers(embedder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    inputs = [make_scene(3, 0).image, "the number"]
    assert np.allclose(Embedder(out).embed(inputs), embedder.embed(inputs), atol=1e-6)
    with pytest.raises(FileExistsError):
        save_for_sentence_transformers(embedder, out)


@pytest.mark.parametrize("normalize", [True, False])
def test_only_classes_of_sentence_transformers_are_named(tmp_path: Path, normalize: bool) -> None:
    embedder = Embedder("tiny", pooling="mean", normalize=normalize, system="Find it.")
    out = save_for_sentence_transformers(embedder, tmp_path / "out")
    modules = json.loads((out / "modules.json").read_text())
    assert [module["type"].partition(".")[0] for module in modules] == ["sentence_transformers"] * (2 + normalize)
    assert all((out / module["path"]).is_dir() for module in modules)
    assert json.loads((out / "1_Pooling" / "config.json").read_text())["pooling_mode"] == "mean"
    assert json.loads((out / "config_sentence_transformers.json").read_text())["prompts"]["query"] == "Find it."


def test_the_vector_of_the_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pooling is 'encoder'"):
        save_for_sentence_transformers(Embedder("tiny", pooling="encoder"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
