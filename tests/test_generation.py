# SPDX-License-Identifier: Apache-2.0
"""generate(): every way of decoding gives the same answer as plain decoding of the single prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, TextIteratorStreamer

from helpers import golden_images
from transformers_fastvlm import compat

# The tiny models' answers are noise and may contain the placeholder, so it is suppressed to compare ways of decoding.
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "suppress_tokens": [483]}
QUESTIONS = [("Describe the image.", 1), ("How many dogs are there?", 2), ("Read the text.", 0), ("What is this?", 3)]
IMAGES = ["wide_rgb.png", "tall_rgb.jpg", "palette_p.png", "square_rgb.png", "tiny_rgb.png", "gray_l.png"]


def conversation(question: str, images: list[Image.Image]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


class Setup:
    """A tiny model with its processor, and prompts with one, two, no and three images."""

    def __init__(self, golden: Path, directory: Path):
        self.directory = directory
        self.model = AutoModelForImageTextToText.from_pretrained(directory)
        self.processor = AutoProcessor.from_pretrained(directory)
        images = golden_images(golden, IMAGES)
        self.conversations = []
        for question, count in QUESTIONS:
            self.conversations.append(conversation(question, images[:count]))
            images = images[count:]

    def inputs(self, conversations: list[Any]) -> Any:
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    def generate(self, conversations: list[Any], model: Any = None, **options: Any) -> list[list[int]]:
        """Return the new tokens of each returned sequence."""
        inputs = self.inputs(conversations)
        out = (model or self.model).generate(**inputs, **(GREEDY | options))
        return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module", params=["qwen2_untied", "qwen2_anyres"])
def setup(request: pytest.FixtureRequest, golden: Path, checkpoint) -> Setup:
    return Setup(golden, checkpoint(request.param))


@pytest.fixture(scope="module")
def plain(golden: Path, checkpoint) -> Setup:
    return Setup(golden, checkpoint("qwen2_untied"))


def test_mixed_batch_equals_single_rows(setup: Setup) -> None:
    together = setup.generate(setup.conversations)
    alone = [setup.generate([row])[0] for row in setup.conversations]
    assert together == alone
    assert len({tuple(row) for row in alone}) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 1e-4, "top_k": 0},
    ],
    ids=["beams, several returned", "beams", "samples"],
)
def test_several_sequences_keep_their_images(options: dict[str, Any], setup: Setup) -> None:
    """Each copy of a prompt must see its own images, also when prompts have several."""
    together = setup.generate(setup.conversations, **options)
    copies = options.get("num_return_sequences", 1)
    alone = [sequence for row in setup.conversations for sequence in setup.generate([row], **options)]
    assert len(together) == copies * len(setup.conversations)
    assert together == alone
    if options.get("do_sample"):  # nearly no temperature: every sample is the greedy answer
        assert together == [row for row in setup.generate(setup.conversations) for _ in range(copies)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_images_are_encoded_once(options: dict[str, Any], plain: Setup) -> None:
    calls = []
    hook = plain.model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    try:
        plain.generate(plain.conversations[:2], **options)
    finally:
        hook.remove()
    # Without a cache, versions before 5.20 encode again for every new token.
    once = not (options == {"use_cache": False} and compat.GENERATE_KEEPS_ENCODER_OUTPUTS)
    assert len(calls) == 1 or not once


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_caches_agree(options: dict[str, Any], setup: Setup) -> None:
    if "cache_implementation" in options:
        options = options | {"disable_compile": True}
    assert setup.generate(setup.conversations, **options) == setup.generate(setup.conversations)


def test_assisted_decoding(setup: Setup) -> None:
    row = setup.conversations[1:2]
    expected = setup.generate(row)
    assistant = AutoModelForImageTextToText.from_pretrained(setup.directory)
    assert setup.generate(row, assistant_model=assistant) == expected
    assert setup.generate(row, prompt_lookup_num_tokens=3) == expected


def test_streamer(plain: Setup) -> None:
    row = plain.conversations[0]
    streamer = TextIteratorStreamer(plain.processor.tokenizer, skip_prompt=True)
    tokens = plain.generate([row], streamer=streamer)[0]
    assert "".join(streamer) == plain.processor.decode(tokens)


def test_compiled_model_gives_the_same_tokens(plain: Setup) -> None:
    row = plain.conversations[1]
    model = AutoModelForImageTextToText.from_pretrained(plain.directory)
    with torch.no_grad():
        inputs = plain.inputs([row])
        expected = model(**inputs).logits
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager", dynamic=False)
        assert torch.allclose(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert plain.generate([row], model=model, cache_implementation="static", disable_compile=True) == plain.generate(
        [row]
    )


def test_answers_stop_although_apples_generation_config_has_no_eos(plain: Setup) -> None:
    generation = plain.model.generation_config
    assert (plain.directory / "generation_config.json").read_text().find("eos") == -1
    assert generation.eos_token_id == 482 and generation.pad_token_id == 480
    assert generation.do_sample is True and generation.temperature == 0.2
    # Make the end token the likeliest one, so that the answer is that token only.
    head = plain.model.lm_head
    weight = head.weight.detach().clone()
    try:
        with torch.no_grad():
            inputs = plain.inputs([plain.conversations[0]])
            last = plain.model.model(**inputs).last_hidden_state[0, -1]
            head.weight[482] = 10 * last
        out = plain.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    finally:
        with torch.no_grad():
            head.weight.copy_(weight)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == [482]


def test_given_generation_config_is_kept(plain: Setup) -> None:
    wanted = GenerationConfig(do_sample=False, eos_token_id=5, pad_token_id=6)
    model = AutoModelForImageTextToText.from_pretrained(plain.directory, generation_config=wanted)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (5, 6)
    assert not model.generation_config.do_sample


def test_chunked_prefill(plain: Setup) -> None:
    row = plain.conversations[1:2]
    if compat.GENERATE_KEEPS_ENCODER_OUTPUTS:
        with pytest.raises(ValueError, match=r"prefill_chunk_size with images needs Transformers 5\.20"):
            plain.generate(row, prefill_chunk_size=20)
    else:
        assert plain.generate(row, prefill_chunk_size=20) == plain.generate(row)


def test_embeddings_as_prompt(plain: Setup) -> None:
    inputs = dict(plain.inputs(plain.conversations[1:2]))
    with torch.no_grad():
        embeds = plain.model.get_input_embeddings()(inputs.pop("input_ids"))
    out = plain.model.generate(inputs_embeds=embeds, **inputs, **GREEDY)
    assert out.tolist() == plain.generate(plain.conversations[1:2])
    beams = plain.model.generate(inputs_embeds=embeds, **inputs, **GREEDY, num_beams=2)
    assert beams.tolist() == plain.generate(plain.conversations[1:2], num_beams=2)
