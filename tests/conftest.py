# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by the suite: golden data and the tiny checkpoints rebuilt from it."""

import functools
import gc
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from helpers import golden_images
from transformers_fastvlm import FastVLMProcessor

# Tiny models are slower on many threads than on one, above all if test processes run in parallel.
torch.set_num_threads(1)

# The first backward pass starts autograd's threads. After torch.compile, which pretends to have a CUDA device, there
# would be one for it, and processes that tests fork could not train.
torch.zeros((), requires_grad=True).backward()

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_finish() -> None:
    """Leave what is imported out of all later collections of garbage: Transformers collects after each engine."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter free everything at its end, or libraries report what they think was leaked."""
    gc.unfreeze()


def _load_golden_module(name: str) -> ModuleType:
    """Import tests/golden/`name`.py, which is a script beside data and not part of a package."""
    if str(GOLDEN) not in sys.path:
        sys.path.insert(0, str(GOLDEN))
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference answers."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_fill() -> ModuleType:
    """The generator of deterministic weights and inputs, tests/golden/fill.py."""
    return _load_golden_module("fill")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build a tiny checkpoint laid out as Apple's by name, once a session; treat it as read-only."""
    _load_golden_module("fill")
    build = _load_golden_module("build").build
    root = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        out = root / name
        if not out.exists():
            build(name, out)
        return out

    return get


@pytest.fixture(scope="session")
def processors(checkpoint: Callable[[str], Path]) -> Callable[[str], FastVLMProcessor]:
    """Load the processor of a tiny checkpoint by name, once a session; treat it as read-only."""
    return functools.cache(lambda name: FastVLMProcessor.from_pretrained(checkpoint(name)))


@pytest.fixture
def processor(processors: Callable[[str], FastVLMProcessor]) -> FastVLMProcessor:
    """The processor of qwen2_tied, read-only."""
    return processors("qwen2_tied")


@pytest.fixture
def image(golden: Path) -> Image.Image:
    """A wide golden image."""
    return golden_images(golden, ["wide_rgb.png"])[0]


@pytest.fixture
def hub_cache(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """An HF_HOME folder with a checkpoint in its cache, as if downloaded from the hub as fastvlm/tiny."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "models--fastvlm--tiny"
    shutil.copytree(checkpoint("qwen2_tied"), folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    return tmp_path


@pytest.fixture
def bitsandbytes_without_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with bfloat16 instructions bitsandbytes packs 4-bit weights, which needs widths in multiples of 64."""
    for name in ("bitsandbytes.nn.modules", "bitsandbytes.backends.cpu.ops"):
        monkeypatch.setattr(importlib.import_module(name), "has_avx512bf16", lambda: False)
