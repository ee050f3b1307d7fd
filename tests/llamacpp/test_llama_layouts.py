# SPDX-License-Identifier: Apache-2.0
"""Weights get the layout for AMX only if the library's compiler is good: with others it crashes the process."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("gguf", "onnx", "onnxscript", "llama_cpp"):
    pytest.importorskip(package, reason="the export to GGUF and llama.cpp are extras")

from gguf_cases import saved_model, tiny_export  # noqa: E402
from llamacpp_cases import Cpu  # noqa: E402

from transformers_fastvlm.engines import llama_layouts  # noqa: E402
from transformers_fastvlm.engines.llama_layouts import choose_layout, configures_tiles, library_files  # noqa: E402
from transformers_fastvlm.engines.llama_library import LlamaContext, LlamaModel, library  # noqa: E402
from transformers_fastvlm.export import export  # noqa: E402

BAD_COMPILER = b"GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0"

AMX, OTHER = b"CPU : AVX2 = 1 | AMX_INT8 = 1 | REPACK = 1 | ", b"CPU : AVX2 = 1 | REPACK = 1 | "


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each precision. Rows of the tiny model do not divide into the blocks of k-quants."""
    wide = saved_model(tmp_path_factory.mktemp("wide") / "model", hidden_size=256, intermediate_size=512)
    exports = {"q4_k_m": export("gguf", wide, wide.parent / "gguf", precision="q4_k_m")}
    return {
        name: exports.get(name, tiny_export()).directory / f"language_model-{name}.gguf"
        for name in ("q4_0", "q4_k_m", "q8_0", "float32")
    }


@pytest.fixture
def bad_files(tmp_path: Path) -> list[Path]:
    """A library of an old compiler."""
    (tmp_path / "libggml-cpu.so").write_bytes(BAD_COMPILER)
    return [tmp_path / "libggml-cpu.so"]


@pytest.mark.parametrize(
    ("code", "good"),
    [
        (b"\x7fELF \0" + BAD_COMPILER, False),
        (b"GCC: (Ubuntu 11.4.0-1ubuntu1~22.04.3) 11.4.0\0", False),
        (b"GCC: (GNU) 11.5.0 20240719\0", True),
        (b"GCC: (conda-forge gcc 12.4.0-2) 12.4.0\0", True),
        (b"GCC: (Ubuntu 13.2.0-23ubuntu4) 13.2.0\0GCC: (GNU) 14.2.1\0", False),
        (b"GCC: (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0\0", True),
        (b"GCC: (GNU) 15.1.0\0", True),
        (b"GCC: (GNU) 10.2.1\0", False),
        (BAD_COMPILER + b"clang version 22.1.8\0", True),
        (BAD_COMPILER + b"GNU C++17 12.2.0 -O3 -fno-tree-dse -fno-dse -fPIC\0", True),
        (BAD_COMPILER + b"GNU C++17 12.2.0 -O3 -fno-tree-dse -fPIC\0", False),
        (b"\x7fELF", False),
    ],
)
def test_compilers_that_are_known_to_be_good(code: bytes, good: bool, tmp_path: Path) -> None:
    (tmp_path / "libggml-cpu.so").write_bytes(code)
    assert configures_tiles([tmp_path / "libggml-cpu.so"]) is good


def test_an_unknown_library_is_not_trusted(tmp_path: Path) -> None:
    assert not configures_tiles([])
    assert not configures_tiles([tmp_path / "deleted.so"])


@pytest.mark.skipif(sys.platform != "linux", reason="the loaded file is found on Linux only")
def test_the_loaded_library_is_found() -> None:
    library()
    (file,) = library_files()
    assert file.name.startswith("libggml-cpu") and b"ggml" in file.read_bytes()


@pytest.mark.parametrize("precision", ["q4_0", "q4_k_m", "q8_0", "float32"])
def test_the_layout_for_a_cpu_with_amx(
    precision: str, weights: dict[str, Path], bad_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_layouts, "library_files", lambda: bad_files)
    options = library().llama_model_default_params()
    layout = choose_layout(Cpu(AMX), options, weights[precision])
    assert not options.use_extra_bufts
    assert bool(options.tensor_buft_overrides) == (layout is not None) == (precision in ("q4_0", "q4_k_m"))


def test_the_layout_of_a_good_library_is_its_own(
    weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libggml-cpu.so").write_bytes(b"GCC: (GNU) 14.2.1\0")
    monkeypatch.setattr(llama_layouts, "library_files", lambda: [tmp_path / "libggml-cpu.so"])
    options = library().llama_model_default_params()
    assert choose_layout(Cpu(AMX), options, weights["q4_0"]) is None
    assert options.use_extra_bufts


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


@pytest.mark.parametrize("precision", ["q4_0", "q4_k_m", "q8_0"])
@pytest.mark.parametrize("layout", ["repacked", "chosen here"])
def test_all_layouts_give_the_same_logits(
    layout: str, precision: str, weights: dict[str, Path], bad_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(found: Any, options: Any, path: str | os.PathLike[str]) -> None:
        options.use_extra_bufts = False

    def repacked(found: Any, options: Any, path: str | os.PathLike[str]) -> Any:
        monkeypatch.setattr(llama_layouts, "library_files", lambda: bad_files)
        return choose_layout(Cpu(AMX), options, path)

    results = []
    for choose in (plain, repacked if layout == "repacked" else choose_layout):
        monkeypatch.setattr("transformers_fastvlm.engines.llama_library.choose_layout", choose)
        results.append(logits(weights[precision]))
    spread = results[0].max() - results[0].min()
    assert np.abs(results[0] - results[1]).max() < 0.01 * spread
