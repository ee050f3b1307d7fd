# SPDX-License-Identifier: Apache-2.0
"""vLLM in half types, its default: the encoder computes some parts in float32, which vLLM's own layers do not take."""

import gc

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

from vllm_running import ENVIRONMENT, MAX_NEW_TOKENS, exact, scene_questions

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.engines import Sampling, load_engine

# vLLM's own imports and processes warn.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.soak)])
def test_answers_are_right(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    conversations, right = scene_questions(30)
    engine = load_engine("vllm", str(tiny_checkpoint()), dtype=dtype, max_images=1, max_model_len=512, cache_gib=0.25)
    try:
        answers = engine.generate(conversations, Sampling(max_new_tokens=MAX_NEW_TOKENS))
    finally:
        engine.close()
        gc.collect()  # vLLM leaves a socket's context to the collector, with a warning that is ignored here only
    assert exact([answer.text for answer in answers], right) >= 90
