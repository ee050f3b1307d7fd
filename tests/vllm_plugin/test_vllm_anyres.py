# SPDX-License-Identifier: Apache-2.0
"""AnyRes under vLLM, from a directory of this package's own layout; its image tokens lie beyond the embedding rows."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

import torch
from PIL import Image
from transformers import AutoProcessor
from vllm_running import ENVIRONMENT, MAX_NEW_TOKENS, Messages, Peer, asked

from transformers_fastvlm import FastVLMConfig, FastVLMForConditionalGeneration

# vLLM's own imports warn.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Path:
    """A saved AnyRes model with heads of 32 channels, the fewest that vLLM has on a CPU."""
    out = tmp_path_factory.mktemp("anyres")
    source = checkpoint("qwen2_anyres")
    processor = AutoProcessor.from_pretrained(source)
    config = FastVLMConfig.from_pretrained(source)
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 2, 1
    config.text_config.initializer_range = 0.3
    config.text_config.vocab_size = processor.image_token_id
    torch.manual_seed(0)
    model = FastVLMForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def conversations(golden: Path) -> list[Messages]:
    wide, tall, small = (
        Image.open(golden / "images" / name).convert("RGB") for name in ("wide_rgb.png", "tall_rgb.jpg", "tiny_rgb.png")
    )
    return [
        asked(wide, "Describe the picture."),
        asked(tall, "Before.", wide, "After. What has changed?"),
        asked("Hello."),
        asked(small, tall, wide, "Compare them."),
    ]


@pytest.fixture(scope="module")
def prompts_and_tokens(directory: Path, conversations: list[Messages]) -> tuple[list[Any], list[list[int]]]:
    """What to ask vLLM, and Transformers' answers."""
    peer = Peer(directory)
    return [peer.prompt(one) for one in conversations], [peer.tokens(one) for one in conversations]


@pytest.fixture(scope="module")
def llm(directory: Path, prompts_and_tokens: Any) -> Iterator[Any]:
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        llm = LLM(
            str(directory), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 27, max_model_len=2048
        )
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def test_images_of_several_tiles(llm: Any, prompts_and_tokens: tuple[list[Any], list[list[int]]]) -> None:
    from vllm import SamplingParams

    prompts, expected = prompts_and_tokens
    params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    alone = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    together = llm.generate(prompts, params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in alone] == expected
    assert [list(output.outputs[0].token_ids) for output in together] == expected
    distinct = {tuple(row) for row in expected}
    assert len(distinct) == len(expected), "answers depend on the pictures, or this shows nothing"
