# SPDX-License-Identifier: Apache-2.0
"""Weights never get the layout for AMX, which crashes the process in builds of older compilers."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("gguf", "onnx", "onnxscript", "llama_cpp"):
    pytest.importorskip(package, reason="the export to GGUF and llama.cpp are extras")

from gguf_cases import saved_model, tiny_export  # noqa: E402

from transformers_fastvlm.engines.llama_layouts import choose_layout  # noqa: E402
from transformers_fastvlm.engines.llama_library import LlamaContext, LlamaModel, library  # noqa: E402
from transformers_fastvlm.export import export  # noqa: E402

AMX, OTHER = b"CPU : AVX2 = 1 | AMX_INT8 = 1 | REPACK = 1 | ", b"CPU : AVX2 = 1 | REPACK = 1 | "


class Cpu:
    """The library on a CPU with other features."""

    def __init__(self, features: bytes) -> None:
        self._features = features

    def __getattr__(self, name: str) -> Any:
        return getattr(library(), name)

    def llama_print_system_info(self) -> bytes:
        return self._features


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each precision. Rows of the tiny model do not divide into the blocks of k-quants."""
    wide = saved_model(tmp_path_factory.mktemp("wide") / "model", hidden_size=256, intermediate_size=512)
    exports = {"q4_k_m": export("gguf", wide, wide.parent / "gguf", precision="q4_k_m")}
    return {
        name: exports.get(name, tiny_export()).directory / f"language_model-{name}.gguf"
        for name in ("q4_0", "q4_k_m", "q8_0", "float32")
    }


@pytest.mark.parametrize("precision", ["q4_0", "q4_k_m", "q8_0", "float32"])
def test_the_layout_for_a_cpu_with_amx(precision: str, weights: dict[str, Path]) -> None:
    options = library().llama_model_default_params()
    layout = choose_layout(Cpu(AMX), options, weights[precision])
    assert not options.use_extra_bufts
    assert bool(options.tensor_buft_overrides) == (layout is not None) == (precision in ("q4_0", "q4_k_m"))


def test_the_layout_for_other_cpus_is_left_to_the_library(weights: dict[str, Path]) -> None:
    options = library().llama_model_default_params()
    assert choose_layout(Cpu(OTHER), options, weights["q4_0"]) is None
    assert options.use_extra_bufts
    assert not options.tensor_buft_overrides


def logits(path: Path) -> np.ndarray[Any, Any]:
    model = LlamaModel(path)
    context = LlamaContext(model, tokens=64, sequences=1, rows=64, threads=1)
    context.decode(np.zeros(40, int), np.arange(40), np.arange(40) == 39, ids=np.arange(40) + 5)
    found = context.logits(39).copy()
    context.close()
    model.close()
    return found


@pytest.mark.parametrize("precision", ["q4_0", "q4_k_m"])
def test_repacked_weights_give_the_same_logits(
    precision: str, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(found: Any, options: Any, path: str | os.PathLike[str]) -> None:
        options.use_extra_bufts = False

    def repacked(found: Any, options: Any, path: str | os.PathLike[str]) -> Any:
        return choose_layout(Cpu(AMX), options, path)

    results = []
    for choose in (plain, repacked):
        monkeypatch.setattr("transformers_fastvlm.engines.llama_library.choose_layout", choose)
        results.append(logits(weights[precision]))
    spread = results[0].max() - results[0].min()
    assert np.abs(results[0] - results[1]).max() < 0.01 * spread
