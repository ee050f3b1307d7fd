# SPDX-License-Identifier: Apache-2.0
"""The native `fast_vlm` beside ours: the same weights, so the same answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_fastvlm.bench import Options

pytest.importorskip("timm", reason="the native fast_vlm needs timm")


def test_native_has_the_same_random_weights(
    checkpoint: Callable[[str], Path], measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers_fastvlm.bench import subjects

    monkeypatch.setattr(subjects, "SIZES", (str(checkpoint("qwen2_tied")),))
    monkeypatch.setattr(
        subjects.FastVLMConfig, "from_preset", staticmethod(lambda name: subjects.FastVLMConfig.from_pretrained(name))
    )
    options = Options(
        models=(str(checkpoint("qwen2_tied")),), against=("native",), sizes=(256,), threads=1, new_tokens=4
    )
    ours_facts, _, ours = measure(options, "fastvlm")
    facts, run, native = measure(options, "native")
    assert facts["class"] == "FastVlmForConditionalGeneration" and ours_facts["weights"] == facts["weights"] == "random"
    assert facts["image_tokens"] == ours_facts["image_tokens"] and facts["image_inputs"] == ours_facts["image_inputs"]
    assert {"encode", "project", "prefill"} < set(run["seconds"])
    inputs = ours.subject.preprocess([ours.image_file])
    with torch.inference_mode():
        expected = native.subject.model(**inputs).logits
        logits = ours.subject.model(**inputs).logits
    assert float((logits - expected).norm() / expected.norm()) < 1e-5
