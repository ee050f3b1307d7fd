# SPDX-License-Identifier: Apache-2.0
"""The embedded tiny model: Apple's layout, the usual ways to load it, and correct answers."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from transformers_fastvlm import FastVLMForConditionalGeneration, FastVLMProcessor
from transformers_fastvlm.checkpoints import detect_layout, tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.data.scenes.content import WORDS
from transformers_fastvlm.tokens import image_token_id_of

SCENES = SceneDataset(60, seed=2026)  # a series that no training uses
FILES_OF_APPLE = {
    "config.json",
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "model.safetensors",
    "README.md",
}


@pytest.fixture(scope="module")
def processor() -> FastVLMProcessor:
    return AutoProcessor.from_pretrained(tiny_checkpoint())


@pytest.fixture(scope="module")
def model() -> FastVLMForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(), dtype="float32").eval()


def answers(model: Any, processor: Any, rows: list[dict[str, Any]]) -> list[str]:
    texts = [
        processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False) for row in rows
    ]
    images = [row["images"] for row in rows]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt").to(model.device, model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=16)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_layout_is_apples() -> None:
    directory = tiny_checkpoint()
    assert {file.name for file in directory.iterdir()} == FILES_OF_APPLE
    assert detect_layout(directory) == "apple"
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 8_000_000
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "llava_qwen2" and config["torch_dtype"] == "bfloat16"
    # Heads of 32 or more: every engine has kernels for them.
    assert config["hidden_size"] // config["num_attention_heads"] >= 32


def test_printed_words_are_read_letter_by_letter(processor) -> None:
    tokenizer = processor.tokenizer
    for word in (*WORDS, "407"):
        assert tokenizer.tokenize(word) == list(word)
    for row in SCENES:
        text = row["messages"][0]["content"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_answers_are_right(model, processor, dtype: torch.dtype) -> None:
    """benchmarks/results/tiny_accuracy.json has the accuracy on 2,000 scenes; here at most 6 of 60 may be wrong."""
    rows = [SCENES[index] for index in range(len(SCENES))]
    given = answers(model.to(dtype), processor, rows)
    model.to(torch.float32)
    expected = [row["messages"][1]["content"] for row in rows]
    wrong = [pair for pair in zip(expected, given, strict=True) if pair[0] != pair[1]]
    assert len(wrong) <= 6, wrong


def test_pipeline(processor) -> None:
    pipe = pipeline("image-text-to-text", model=str(tiny_checkpoint()), dtype="float32")
    row = SCENES[0]
    content = [
        {"type": "image", "image": row["images"][0]},
        {"type": "text", "text": row["messages"][0]["content"].removeprefix("<image>\n")},
    ]
    answer = pipe(text=[{"role": "user", "content": content}], return_full_text=False, max_new_tokens=16)
    assert answer[0]["generated_text"] == answers(pipe.model, processor, [row])[0]


def test_its_configuration_is_read_without_the_tokenizer() -> None:
    program = """if True:
        import sys
        import transformers_fastvlm
        from transformers import AutoConfig
        from transformers_fastvlm.checkpoints import tiny_checkpoint
        directory, opened = str(tiny_checkpoint()), []
        sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
        config = AutoConfig.from_pretrained(directory)
        print(config.image_token_id, *sorted({path[len(directory) + 1 :] for path in opened if directory in path}))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [str(image_token_id_of(tiny_checkpoint())), "config.json"]
