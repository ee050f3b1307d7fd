# SPDX-License-Identifier: Apache-2.0
"""Attention is computed without flash attention where that decodes faster and its scores fit into memory."""

import pytest

for package in ("gguf", "onnx", "onnxscript", "llama_cpp"):
    pytest.importorskip(package, reason="the export to GGUF and llama.cpp are extras")

import numpy as np  # noqa: E402
from gguf_cases import tiny_export  # noqa: E402
from llamacpp_cases import Cpu  # noqa: E402

from transformers_fastvlm.engines.llama_library import LlamaContext, LlamaModel, library  # noqa: E402

AVX2, AVX512 = b"CPU : AVX2 = 1 | REPACK = 1 | ", b"CPU : AVX2 = 1 | AVX512 = 1 | REPACK = 1 | "


@pytest.mark.parametrize(
    ("features", "limit", "exact", "flash"),
    [
        (AVX2, None, False, True),
        (AVX2, None, True, False),
        (AVX512, None, False, False),
        (AVX512, 64 * 64 * 4, False, True),  # the scores of one head; the model has six
    ],
)
def test_flash_attention_is_left_to_the_library_or_disabled(
    features: bytes, limit: int | None, exact: bool, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        monkeypatch.setattr("transformers_fastvlm.engines.llama_library._MAX_SCORES", limit)
    model = LlamaModel(tiny_export().directory / "language_model-float32.gguf")
    model.library = Cpu(features)
    context = LlamaContext(model, tokens=64, sequences=1, rows=64, threads=1, exact=exact)
    context.close()
    model.close()
    (options,) = model.library.contexts
    off = library().LLAMA_FLASH_ATTN_TYPE_DISABLED
    assert (options.flash_attn_type == off) is not flash


def test_both_forms_give_the_same_logits() -> None:
    rows = []
    for features in (AVX2, AVX512):
        model = LlamaModel(tiny_export().directory / "language_model-float32.gguf")
        model.library = Cpu(features)
        context = LlamaContext(model, tokens=64, sequences=1, rows=64, threads=1)
        context.decode(np.zeros(40, int), np.arange(40), np.arange(40) == 39, ids=np.arange(40) + 5)
        rows.append(context.logits(39).copy())
        context.close()
        model.close()
    spread = rows[0].max() - rows[0].min()
    assert np.abs(rows[0] - rows[1]).max() < 0.01 * spread
