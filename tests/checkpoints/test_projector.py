# SPDX-License-Identifier: Apache-2.0
"""The projector file of LLaVA's first training stage."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from transformers_fastvlm.checkpoints import load_projector

OURS = [
    f"model.multi_modal_projector.{part}"
    for part in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
]


def stage_one() -> dict[str, torch.Tensor]:
    shapes = {"0.weight": (4, 6), "0.bias": (4,), "2.weight": (4, 4), "2.bias": (4,)}
    return {f"model.mm_projector.{name}": torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_reads_both_kinds_of_file(tmp_path: Path, suffix: str):
    tensors, path = stage_one(), tmp_path / f"mm_projector{suffix}"
    (torch.save if suffix == ".bin" else save_file)(tensors, path)
    loaded = load_projector(path)
    assert list(loaded) == OURS
    for ours, tensor in zip(OURS, tensors.values(), strict=True):
        assert loaded[ours].dtype == torch.bfloat16
        assert torch.equal(loaded[ours], tensor)


def test_reads_our_names_too(tmp_path: Path):
    tensors = dict(zip(OURS, stage_one().values(), strict=True))
    save_file(tensors, tmp_path / "projector.safetensors")
    assert load_projector(tmp_path / "projector.safetensors").keys() == tensors.keys()


def test_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_projector(tmp_path / "mm_projector.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"model.embed_tokens.weight": torch.zeros(2, 4)}, r"not the projector's: model\.embed_tokens"),
        (lambda t: {name: t[name] for name in list(t)[1:]}, r"lacks model\.multi_modal_projector\.linear_1\.weight"),
        (lambda t: t | {"model.mm_projector.2.weight": torch.zeros(4, 5)}, r"\(4, 5\)"),
        (lambda t: t | {"model.mm_projector.0.bias": torch.zeros(())}, "expected weight"),
        (lambda t: t | {"model.mm_projector.0.bias": torch.zeros(4, dtype=torch.int64)}, "floating-point"),
        (lambda t: t | {"model.mm_projector.0.bias": 3.0}, "floating-point"),
        (lambda t: t | {OURS[0]: torch.zeros(4, 6)}, "twice"),
        (lambda t: list(t.values()), "expected a dictionary"),
    ],
)
def test_anything_else_is_an_error(tmp_path: Path, change, message: str):
    torch.save(change(stage_one()), tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=message):
        load_projector(tmp_path / "mm_projector.bin")


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_code_in_a_pickle_does_not_run(tmp_path: Path, save):
    save(stage_one() | {"model.mm_projector.0.bias": Malicious(tmp_path / "ran")}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="could run code"):
        load_projector(tmp_path / "mm_projector.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 150])
def test_truncated_file(tmp_path: Path, suffix: str, kept: int):
    path = tmp_path / f"mm_projector{suffix}"
    (torch.save if suffix == ".bin" else save_file)(stage_one(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="damaged"):
        load_projector(path)
