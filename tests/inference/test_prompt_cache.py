# SPDX-License-Identifier: Apache-2.0
"""PromptCache: tokens of a fresh run, and nothing computed twice."""

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, TextIteratorStreamer

from helpers import golden_images
from transformers_fastvlm import compat
from transformers_fastvlm.inference import PromptCache
from transformers_fastvlm.inference.image_memory import ImageMemory

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
NAMES = ["wide_rgb.png", "tall_rgb.jpg", "square_rgb.png"]


def user(text: str, *images: Image.Image) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


class Setup:
    """A tiny model that counts what its parts are given, beside a cache for it."""

    def __init__(self, directory: Path, golden: Path):
        self.model = AutoModelForImageTextToText.from_pretrained(directory)
        self.processor = AutoProcessor.from_pretrained(directory)
        self.images = golden_images(golden, NAMES)
        self.encoded = self.fed = self.prepared = 0
        vision, language = self.model.model.vision_tower, self.model.model.language_model
        vision.register_forward_pre_hook(self._count_tiles, with_kwargs=True)
        language.register_forward_pre_hook(self._count_tokens, with_kwargs=True)
        self.cache = PromptCache(self.model, self.processor)

    def _count_tiles(self, module: Any, args: Any, kwargs: Any) -> None:
        self.encoded += len(args[0] if args else kwargs["pixel_values"])

    def _count_tokens(self, module: Any, args: Any, kwargs: Any) -> None:
        rows, length = kwargs["inputs_embeds"].shape[:2]
        self.fed += rows * length

    def ask(self, messages: list[dict[str, Any]], **options: Any) -> tuple[list[list[int]], int, int]:
        """Return the new tokens of the cache, which are those of a fresh run, the tiles encoded and tokens fed."""
        options = GREEDY | options
        fresh = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        length = fresh["input_ids"].shape[1]
        torch.manual_seed(0)
        expected = self.model.generate(**fresh, **options)[:, length:].tolist()
        inputs = self.cache.prepare(messages)
        assert list(inputs) == list(fresh) and all(inputs[name].equal(fresh[name]) for name in fresh)
        self.encoded = self.fed = 0
        torch.manual_seed(0)
        got = self.cache.generate(**inputs, **options)[:, length:].tolist()
        assert got == expected
        return got, self.encoded, self.fed


@pytest.fixture(scope="module", params=["qwen2_untied", "qwen2_anyres", "llama"])
def loaded(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], golden: Path) -> Setup:
    return Setup(checkpoint(request.param), golden)


@pytest.fixture
def setup(loaded: Setup) -> Iterator[Setup]:
    loaded.cache.reset()
    yield loaded
    loaded.model.generation_config.num_beams = None


@pytest.fixture
def plain(checkpoint: Callable[[str], Path], golden: Path) -> Setup:
    return Setup(checkpoint("qwen2_untied"), golden)


def new_tokens(setup: Setup, messages: list[dict[str, Any]]) -> int:
    return int(setup.cache.prepare(messages)["input_ids"].shape[1])


def test_turns_encode_nothing_again_and_prefill_what_is_new(setup: Setup) -> None:
    """The second turn feeds the last answer's end and the question; the third brings an image, encoded alone."""
    first, second, third = setup.images
    talk = [user("What is it?", first)]
    tokens, tiles, fed = setup.ask(talk)
    assert tiles > 0 and fed == new_tokens(setup, talk) + 5  # the last of six new tokens is never fed
    one = tiles
    before = new_tokens(setup, talk)

    talk += [said(setup.processor.decode(tokens[0], skip_special_tokens=True)), user("And its colour?")]
    _, tiles, fed = setup.ask(talk)
    assert tiles == 0 and fed == new_tokens(setup, talk) - setup.cache.reused_tokens + 5
    # At least the first prompt is reused, but for a last token that may join the answer's first letters.
    assert setup.cache.reused_tokens >= before - 1 and setup.cache.prefilled_tokens < 60

    talk += [said("red"), user("Which is larger?", second, first), said("one"), user("This?", third)]
    _, tiles, _ = setup.ask(talk)
    assert setup.cache.encoded_images == 2 and 0 < tiles and (tiles == 2 or one > 1)
    assert setup.cache.reused_tokens > before


def test_questions_of_their_own_share_the_image(setup: Setup) -> None:
    """Question two does not see question one, yet the image is neither encoded nor prefilled again."""
    image = setup.images[0]
    image_tokens = int((setup.cache.prepare([user("a", image)])["input_ids"] == setup.processor.image_token_id).sum())
    answers = set()
    for index, question in enumerate(["What is it?", "How many dogs are there?", "What is it?"]):
        tokens, tiles, _ = setup.ask([user(question, image)])
        answers.add(tuple(tokens[0]))
        assert bool(tiles) == (index == 0)
        assert (setup.cache.reused_tokens > image_tokens) == (index > 0)
    assert len(answers) == 2
    setup.ask([user("What is it?", image)])
    assert setup.cache.prefilled_tokens == 1  # the very same prompt: only its last token


def test_edited_history_and_other_images_fall_back_to_what_is_common(setup: Setup) -> None:
    first, second, _ = setup.images
    talk = [user("What is it?", first), said("a dog"), user("Where?")]
    setup.ask(talk)
    edited = [talk[0], said("two cats on a mat"), talk[2]]
    _, tiles, _ = setup.ask(edited)
    assert tiles == 0 and setup.cache.reused_tokens > new_tokens(setup, talk[:1]) - 5
    other = [user("What is it?", second), *talk[1:]]
    _, tiles, _ = setup.ask(other)
    shared = setup.cache.reused_tokens
    assert tiles > 0 and 0 < shared < new_tokens(setup, [user("")])  # the system prompt
    _, tiles, _ = setup.ask(talk)  # back to an image that left the prompt: prefilled, but not encoded
    assert tiles == 0 and setup.cache.reused_tokens == shared
    _, tiles, _ = setup.ask([{"role": "system", "content": "Zzz."}, *talk])
    assert tiles == 0 and setup.cache.prefilled_tokens > 20
    _, tiles, _ = setup.ask([user("No image.")])
    assert tiles == 0


def test_the_same_image_twice_is_encoded_once(setup: Setup) -> None:
    image = setup.images[0]
    _, alone, _ = setup.ask([user("One?", image)])
    setup.cache.reset()
    _, both, _ = setup.ask([user("Alike?", image, image.copy())])
    assert both == alone and setup.cache.encoded_images == 1
    _, tiles, _ = setup.ask([user("Alike now?", image, image, image)])
    assert tiles == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_beams=2)},
        {"do_sample": True, "temperature": 0.7, "top_k": 0},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_return_sequences": 3},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("loaded", ["qwen2_anyres"], indirect=True)
def test_ways_of_decoding(options: dict[str, Any], setup: Setup) -> None:
    """Whatever the order of plain and other decoding, each call continues from what the last one left."""
    first, second, _ = setup.images
    talk = [user("What is it?", first)]
    _, tiles, fed = setup.ask(talk, **options)
    assert tiles > 0
    _, tiles, _ = setup.ask([*talk, said("A cat."), user("Where?")], **options)
    assert tiles == 0 and setup.cache.reused_tokens >= new_tokens(setup, talk) - 2
    _, tiles, _ = setup.ask([*talk, said("A cat."), user("When?")])
    assert tiles == 0 and setup.cache.reused_tokens > new_tokens(setup, talk)
    _, tiles, _ = setup.ask([*talk, said("A cat."), user("And that?", second)], **options)
    assert tiles > 0 and setup.cache.encoded_images == 1
    if options.get("num_beams"):  # the prompt is prefilled in one row, only its last token in each
        length = new_tokens(setup, talk)
        assert fed == length - 1 + options["num_beams"] * GREEDY["max_new_tokens"]


def test_beams_of_the_models_own_configuration(setup: Setup) -> None:
    setup.model.generation_config.num_beams = 2
    talk = [user("What is it?", setup.images[0])]
    for _ in range(2):
        setup.ask(talk)
    assert setup.cache.prefilled_tokens == 1


def test_an_interrupted_answer_leaves_its_prompt(setup: Setup) -> None:
    class Interrupt:
        def __init__(self, after: int):
            self.left = after

        def put(self, tokens: Any) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

        def end(self) -> None:
            raise AssertionError

    talk = [user("What is it?", setup.images[0])]
    inputs = setup.cache.prepare(talk)
    with pytest.raises(KeyboardInterrupt):
        setup.cache.generate(**inputs, **GREEDY, streamer=Interrupt(3))
    _, tiles, _ = setup.ask([*talk, said("a"), user("Where?")])
    assert tiles == 0 and setup.cache.reused_tokens >= new_tokens(setup, talk) - 1


@pytest.mark.parametrize("layer", [0, 1])
def test_an_error_within_the_prefill_leaves_nothing_half_done(layer: int, setup: Setup) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    talk = [user("What is it?", setup.images[0])]
    for messages in (talk, [*talk, said("a cat"), user("Where?")]):
        hook = setup.model.model.language_model.layers[layer].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            setup.cache.generate(**setup.cache.prepare(messages), **GREEDY)
        hook.remove()
        _, tiles, _ = setup.ask(messages)
        assert tiles == 0


def test_a_sliding_window_of_attention(checkpoint: Callable[[str], Path], golden: Path) -> None:
    """A cache made for the window would have lost what is to be reused."""
    setup = Setup(checkpoint("qwen2_untied"), golden)
    config = setup.model.config.text_config
    config.use_sliding_window, config.sliding_window, config.max_window_layers = True, 8, 0
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    setup.model = type(setup.model)(setup.model.config).eval()
    setup.cache = PromptCache(setup.model, setup.processor)
    talk = [user("What is it?", setup.images[0])]
    setup.ask(talk)
    setup.ask([*talk, said("a cat"), user("Where?")])
    assert setup.cache.reused_tokens > 20
    setup.ask([user("Who?", setup.images[0])])
    assert setup.cache.reused_tokens > 20


def test_answer_streams_and_decodes(plain: Setup) -> None:
    talk = [user("What is it?", plain.images[0])]
    tokens, *_ = plain.ask(talk)
    streamer = TextIteratorStreamer(plain.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = plain.cache.answer(talk, **GREEDY, streamer=streamer)
    assert text == "".join(streamer).strip() == plain.processor.decode(tokens[0], skip_special_tokens=True).strip()
    details = plain.cache.generate(**plain.cache.prepare(talk), **GREEDY, return_dict_in_generate=True)
    assert details.sequences[0, -6:].tolist() == tokens[0]
    assert plain.cache.answer(talk, **GREEDY, return_dict_in_generate=True) == text
    with pytest.raises(ValueError, match="num_return_sequences is 2, but answer"):
        plain.cache.answer(talk, num_beams=2, num_return_sequences=2)


def test_a_prompt_that_ends_in_an_image(plain: Setup) -> None:
    inputs = plain.processor(text="Look: <image>", images=plain.images[0], return_tensors="pt")
    expected = plain.model.generate(**inputs, **GREEDY).tolist()
    for _ in range(2):  # the second time its last token is wanted again, and so the whole image
        assert plain.cache.generate(**inputs, **GREEDY).tolist() == expected
    assert 0 < plain.cache.reused_tokens < 10 and plain.cache.encoded_images == 0
    with pytest.raises(ValueError, match="ends in an image"):
        plain.cache.generate(**inputs, **GREEDY, num_beams=2)


def test_images_are_forgotten_in_order_and_on_demand(plain: Setup) -> None:
    plain.cache = PromptCache(plain.model, plain.processor, max_images=1)
    encoded = []
    for index in (0, 1, 0, 2, 0, 1):
        encoded.append(plain.ask([user("What?", plain.images[index])])[1])
    assert encoded == [1, 1, 0, 1, 0, 1]
    plain.cache.reset()
    assert plain.ask([user("What?", plain.images[1])])[1] == 1 and plain.cache.reused_tokens == 0
    with pytest.raises(ValueError, match="max_images is 0"):
        PromptCache(plain.model, plain.processor, max_images=0)


def test_images_are_compared_by_their_pixels(plain: Setup) -> None:
    """An image that was drawn on is another one; an equal copy is the same."""
    image = plain.images[0].copy()
    assert plain.ask([user("What?", image)])[1] == 1
    assert plain.ask([user("What?", image.copy())])[1] == 0
    ImageDraw.Draw(image).rectangle((0, 0, 200, 200), fill="red")
    assert plain.ask([user("What?", image)])[1] == 1


def test_the_image_processor_prepares_an_image_once(loaded: Setup) -> None:
    class Counting:
        def __init__(self, inner: Any):
            self.inner, self.seen = inner, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, images: list[Any], **options: Any) -> Any:
            self.seen += len(images)
            return self.inner(images, **options)

    counting = Counting(loaded.processor.image_processor)
    memory = ImageMemory(counting, {}, max_images=2)
    first, second, third = loaded.images
    palette = first.quantize(16)
    seen = []
    for images in ([first], [first, second], [second, first, second], [third], [first], [second], [palette], [palette]):
        got, before = memory(images, return_tensors="pt"), counting.seen
        seen.append(before)
        expected = counting.inner(images, return_tensors="pt")
        assert list(got) == list(expected) and all(got[name].equal(expected[name]) for name in expected)
    assert seen == [1, 2, 2, 3, 3, 4, 5, 6]
    counting.seen = 0
    memory([second], return_tensors="pt", image_mean=[0.5] * 3)
    assert counting.seen == 1  # asked for otherwise
    assert memory.size is counting.inner.size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.arange(10).view(2, 5)}, r"shape \(2, 5\); expected \(1, length\)"),
        ({"attention_mask": torch.tensor([[0, 1]])}, "expected a prompt without padding"),
        ({"pixel_values": None}, r"placeholders, but the 0 images have 0 features"),
        ({"num_tiles": torch.tensor([1])}, "image_sizes is needed too"),
        ({"past_key_values": object()}, "past_key_values is set, but PromptCache has its own"),
        ({"cache": object()}, "cache is set, but PromptCache has its own"),
        ({"inputs_embeds": torch.ones(1, 2, 3)}, "inputs_embeds is set"),
        ({"cache_implementation": "static"}, "only a dynamic cache"),
        ({"generation_config": GenerationConfig(cache_implementation="static")}, "only a dynamic cache"),
        ({"assistant_model": object()}, "assisted decoding runs the whole prompt"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "assisted decoding"),
        ({"mm_encoder_outputs": {}}, "Pass pixel_values"),
        ({"use_cache": False}, "use_cache is False"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refuses(change: dict[str, Any], message: str, plain: Setup) -> None:
    inputs = dict(plain.cache.prepare([user("What?", plain.images[0])]))
    with pytest.raises(ValueError, match=message):
        plain.cache.generate(**(inputs | GREEDY | change))


def test_several_answers_to_one_prompt(plain: Setup) -> None:
    """Rows that are the same are prefilled once, and the next question finds the prompt in the cache."""
    inputs = plain.cache.prepare([user("What is it?", plain.images[0])])
    (alone,) = plain.cache.generate(**inputs, **GREEDY).tolist()
    plain.cache.reset()
    inputs |= {name: inputs[name].expand(3, -1) for name in ("input_ids", "attention_mask")}
    plain.fed = 0
    rows = plain.cache.generate(**inputs, **GREEDY).tolist()
    assert rows == [alone] * 3
    assert plain.fed == inputs["input_ids"].shape[1] - 1 + 3 * GREEDY["max_new_tokens"]
    plain.ask([user("What is it?", plain.images[0])])
    assert plain.cache.prefilled_tokens == 1


def test_threads_get_their_own_answers(plain: Setup) -> None:
    questions = ["What is it?", "How many dogs are there?", "And the colour?"] * 2
    talks = [[user(text, plain.images[index % 2])] for index, text in enumerate(questions)]
    expected = [plain.cache.answer(talk, **GREEDY) for talk in talks]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda talk: plain.cache.answer(talk, **GREEDY), talks)) == expected


def test_chunked_prefill(plain: Setup) -> None:
    talk = [user("What is it?", plain.images[0])]
    if compat.GENERATE_KEEPS_ENCODER_OUTPUTS:
        with pytest.raises(ValueError, match=r"prefill_chunk_size is set"):
            plain.cache.generate(**plain.cache.prepare(talk), **GREEDY, prefill_chunk_size=20)
        return
    plain.ask(talk, prefill_chunk_size=20)
    plain.ask([*talk, said("a cat"), user("Where is it, and why, and since when?")], prefill_chunk_size=4)
    assert plain.cache.reused_tokens > 10


def test_copies_of_an_image_memory(processor: Any, image: Any) -> None:
    memory = ImageMemory(processor.image_processor, {}, max_images=2)
    memory([image], return_tensors="pt")
    for twin in (copy.copy(memory), copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert twin.size == processor.image_processor.size
        assert twin([image], return_tensors="pt")["pixel_values"].equal(
            processor.image_processor([image], return_tensors="pt")["pixel_values"]
        )
