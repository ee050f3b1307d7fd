# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is known by: the content of its files, or its commit on the hub."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from transformers_fastvlm.checkpoints.checkpoint_identity import checkpoint_identity


def test_a_checkpoint_is_known_by_the_content_of_its_files(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint("qwen2_tied"), tmp_path / "copy"))
    identity = checkpoint_identity(str(copy))
    assert identity == checkpoint_identity(str(checkpoint("qwen2_tied")))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = checkpoint_identity(str(copy))
    assert {name for name in identity if identity[name] != changed[name]} == {"model.safetensors"}


def test_a_checkpoint_of_the_hub_is_known_by_its_commit(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(hub_cache / "hub"))
    assert checkpoint_identity("fastvlm/tiny") == {"commit": "0123456789abcdef0123456789abcdef01234567"}
