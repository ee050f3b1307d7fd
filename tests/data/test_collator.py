# SPDX-License-Identifier: Apache-2.0
"""Batches: the golden ids and labels, both templates, truncation, padding, AnyRes, and rows that are refused."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import golden_images
from transformers_fastvlm import FastVLMForConditionalGeneration, FastVLMProcessor
from transformers_fastvlm.data import FastVLMDataCollator, SampleError

ROLES = {"human": "user", "gpt": "assistant"}
IMAGE = Image.new("RGB", (8, 8))
TOKENS = 16  # of an image of the golden checkpoints, 256 pixels


@pytest.fixture
def image(golden: Path) -> Image.Image:
    return golden_images(golden, ["tiny_rgb.png"])[0]


def llava_sample(golden: Path, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "messages": [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]],
        "images": golden_images(golden, [row["image"]] if "image" in row else []),
    }


def sample(*turns: str, images: Any = (), **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": words} for index, words in enumerate(turns)]
    return {"messages": messages, "images": list(images), **more}


def collapsed(batch: dict[str, torch.Tensor], row: int, image_token_id: int) -> tuple[list[int], list[int]]:
    """Ids and labels of a row without its padding, each image as one -200."""
    real = batch["attention_mask"][row].bool()
    ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
    place = ids == image_token_id
    assert (labels[place] == -100).all()
    keep = ~place | ~torch.cat([torch.tensor([False]), place[:-1]])
    assert place.sum() == TOKENS * (keep & place).sum()
    return torch.where(place, -200, ids)[keep].tolist(), labels[keep].tolist()


def learned(processor: FastVLMProcessor, batch: dict[str, torch.Tensor], row: int = 0) -> str:
    return processor.tokenizer.decode(batch["labels"][row][batch["labels"][row] != -100])


@pytest.mark.parametrize("conversation", ["sft", "plain"])
def test_golden_labels(golden: Path, processor: FastVLMProcessor, conversation: str) -> None:
    reference = json.loads((golden / "training.json").read_text())[conversation]
    samples = [llava_sample(golden, row) for row in reference["samples"]]
    batch = FastVLMDataCollator(processor, conversation=conversation)(samples)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert batch["pixel_values"].shape == (2, 3, 256, 256)
    for row in range(len(samples)):
        real = [index for index, mask in enumerate(reference["attention_mask"][row]) if mask]
        ids, labels = ([reference[name][row][index] for index in real] for name in ("input_ids", "labels"))
        assert collapsed(batch, row, processor.image_token_id) == (ids, labels)
        padding = ~batch["attention_mask"][row].bool()
        assert (batch["labels"][row][padding] == -100).all()
        assert (batch["input_ids"][row][padding] == processor.tokenizer.pad_token_id).all()


@pytest.mark.parametrize("conversation", ["sft", "plain"])
def test_golden_loss(golden: Path, checkpoint: Callable[[str], Path], conversation: str) -> None:
    path = checkpoint("qwen2_tied")
    reference = json.loads((golden / "training.json").read_text())[conversation]
    model = FastVLMForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    collator = FastVLMDataCollator(FastVLMProcessor.from_pretrained(path), conversation=conversation)
    with torch.no_grad():
        loss = model(**collator([llava_sample(golden, row) for row in reference["samples"]])).loss
    assert loss.item() == pytest.approx(reference["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["qwen2_tied", "llama", "qwen2_anyres"])
def test_ids_and_pixels_are_the_processor_s(
    golden: Path, processors: Callable[[str], FastVLMProcessor], name: str
) -> None:
    processor = processors(name)
    wide, tall, tiny = golden_images(golden, ["wide_rgb.png", "tall_rgb.jpg", "tiny_rgb.png"])
    samples = [
        sample("<image>\nWhat?", "Köln 猫 \N{CAT FACE}.", "And?", "  spaced  \n", images=[wide]),
        sample("Only words?", "Yes."),
        sample("<image> and <image>\nSame?", "No.", "And <image>?", "A dog.", images=[tall, tiny, wide]),
    ]
    samples[1]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    batch = FastVLMDataCollator(processor)(samples)
    expected = processor.apply_chat_template(
        [row["messages"] for row in samples],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right", "images": [row["images"] for row in samples]},
    )
    masks = expected.pop("assistant_masks").bool()
    assert torch.equal(batch["labels"], expected["input_ids"].where(masks, -100))
    assert set(batch) == {*expected, "labels"}
    assert ("num_tiles" in batch) == (name == "qwen2_anyres")
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key


def test_vicuna_learns_the_answers_and_their_ends(
    processors: Callable[[str], FastVLMProcessor], image: Image.Image
) -> None:
    processor = processors("llama")
    batch = FastVLMDataCollator(processor)([sample("<image>\nWhat?", "A cat.", "And?", "42", images=[image])])
    assert learned(processor, batch).replace(" ", "") == "Acat.</s>42</s>"


def test_text_alone_has_no_pixels(processor: FastVLMProcessor) -> None:
    batch = FastVLMDataCollator(processor)([sample("One?", "1."), {"messages": sample("Two?", "2.")["messages"]}])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert learned(processor, batch, 1) == "2.<|im_end|>\n"


def test_parts_are_as_strings(processor: FastVLMProcessor, image: Image.Image) -> None:
    """The messages of TRL, with the images beside them or inside."""
    collator = FastVLMDataCollator(processor)
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    text = {"type": "text", "text": "What?"}
    beside = {"messages": [{"role": "user", "content": [{"type": "image"}, text]}, answer], "images": [image]}
    inside = {"messages": [{"role": "user", "content": [text, {"type": "image", "image": image}]}, answer]}
    expected = collator([sample("<image>\nWhat?", "A cat.", images=[image])])
    for row in (beside, inside):
        batch = collator([row])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_truncation_cuts_the_answer(processor: FastVLMProcessor, image: Image.Image) -> None:
    rows = [sample("<image>\nWhat?", "A cat, two dogs and a red sign.", images=[image]), sample("Hi?", "Hi.")]
    whole = FastVLMDataCollator(processor)(rows)
    length = int(whole["attention_mask"].sum(1).max())
    for cut in (1, 5, 9):
        batch = FastVLMDataCollator(processor, max_length=length - cut)(rows)
        assert batch["input_ids"].shape[1] == length - cut
        for key in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(batch[key], whole[key][:, : length - cut])
        assert (batch["input_ids"] == processor.image_token_id).sum() == TOKENS
        assert torch.equal(batch["pixel_values"], whole["pixel_values"])


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (
            20,
            r"^sample 0 of the batch \(id 'x'\): its last image ends at token \d+ of \d+, but max_length is 20, and",
        ),
        (40, r"^sample 0 of the batch \(id 'x'\): max_length=40 cuts off all supervised tokens"),
    ],
)
def test_rows_that_cannot_be_cut(
    processor: FastVLMProcessor, image: Image.Image, max_length: int, expected: str
) -> None:
    rows = [sample("<image>\nWhat?", "A cat.", images=[image], id="x"), sample("H", "A.")]
    with pytest.raises(SampleError, match=expected):
        FastVLMDataCollator(processor, max_length=max_length)(rows)


def test_a_later_image_is_not_cut(processor: FastVLMProcessor, image: Image.Image) -> None:
    row = sample("Hi?", "A long answer.", "<image>\nAnd this?", "A cat.", images=[image])
    length = FastVLMDataCollator(processor)([row])["input_ids"].shape[1]
    with pytest.raises(SampleError, match="an image is never cut"):
        FastVLMDataCollator(processor, max_length=length - 30)([row])


def test_rows_beyond_the_context(checkpoint: Callable[[str], Path]) -> None:
    processor = FastVLMProcessor.from_pretrained(checkpoint("qwen2_tied"))
    processor.context_length = 40
    row = sample("Hi?", "word " * 60, id=7)
    with pytest.raises(SampleError, match=r"\(id 7\): the row has \d+ tokens, but the model's context holds 40"):
        FastVLMDataCollator(processor)([row])
    assert FastVLMDataCollator(processor, max_length=40)([row])["input_ids"].shape == (1, 40)
    with pytest.raises(ValueError, match="max_length is 41, but the model's context holds 40"):
        FastVLMDataCollator(processor, max_length=41)


def test_padding_to_a_multiple(processor: FastVLMProcessor) -> None:
    rows = [sample("Hi?", "Yes, a cat and a dog."), sample("Hi?", "No.")]
    plain = FastVLMDataCollator(processor)(rows)
    padded = FastVLMDataCollator(processor, pad_to_multiple_of=64)(rows)
    assert all(value.shape == (2, 64) for value in padded.values())
    length = plain["input_ids"].shape[1]
    assert all(torch.equal(padded[key][:, :length], plain[key]) for key in plain)
    assert (padded["labels"][:, length:] == -100).all() and (padded["attention_mask"][:, length:] == 0).all()


def test_images_of_any_shape_and_mode(golden: Path, processor: FastVLMProcessor) -> None:
    images = [
        Image.open(golden / "images" / name) for name in ("palette_p.png", "gray_l.png", "cmyk.jpg", "alpha_rgba.png")
    ]
    images.append(Image.new("RGB", (10_000, 1)))
    batch = FastVLMDataCollator(processor)([sample("<image>\nWhat?", "This.", images=[image]) for image in images])
    assert batch["pixel_values"].equal(processor.image_processor(images, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "assistant", "content": "Hi."}]}, "starts with the assistant"),
        ({"messages": [{"role": "robot", "content": "Hi."}]}, "unknown role 'robot'; expected 'user', 'assistant'"),
        (sample("Hi?", "  "), "answer 0 .* is empty"),
        (sample("Hi?", "Yes.", "And?"), "ends with a question"),
        (sample("<image><image>", "Yes.", images=[IMAGE]), "2 <image>, but the row has 1 images"),
        (sample("What?", "Yes.", images=[IMAGE]), "0 <image>, but the row has 1 images"),
        (sample("What?", "<image>"), "role 'assistant' has <image>, but only user messages may have images"),
        (sample("<image>", "Yes.", images=[None]), r"an image is None \(NoneType\); expected a Pillow"),
        (sample("<image>", "Yes.", images=["http://x/y.png"]), r"an image is 'http://x/y.png' \(str\); expected"),
        (sample("<image>", "Yes.", images=[{"path": "a"}]), r"\(dict\).*data.load opens the images"),
        ({}, "no 'messages'; its keys are 'id'.*remove_unused_columns=False"),
    ],
)
def test_refused_rows_are_named(processor: FastVLMProcessor, row: dict[str, Any], expected: str) -> None:
    with pytest.raises(SampleError, match=rf"^sample 1 of the batch \(id 'r7'\): .*{expected}"):
        FastVLMDataCollator(processor)([sample("Hi?", "Fine."), {**row, "id": "r7"}])


def test_the_image_that_is_refused_is_named(processor: FastVLMProcessor, image: Image.Image) -> None:
    rows = [sample("<image>", "Yes.", images=[image], id=number) for number in range(3)]
    rows[1]["images"] = [np.full((8, 8, 3), 2.5, np.float32)]
    with pytest.raises(SampleError, match=r"^sample 1 of the batch \(id 1\): a floating-point image has values"):
        FastVLMDataCollator(processor)(rows)


@pytest.mark.parametrize("row", [sample("Hi?", "Yes."), sample("<image>", "1", "Two?", "2", images=[IMAGE])])
def test_plain_takes_captions_only(processor: FastVLMProcessor, row: dict[str, Any]) -> None:
    with pytest.raises(SampleError, match="conversation='plain' expects a caption"):
        FastVLMDataCollator(processor, conversation="plain")([row])


def test_options_are_checked(checkpoint: Callable[[str], Path]) -> None:
    processor = FastVLMProcessor.from_pretrained(checkpoint("qwen2_tied"))
    for options, expected in (
        ({"conversation": "chat"}, "expected one of 'sft', 'plain'"),
        ({"max_length": 0}, "max_length is 0; expected a positive number"),
        ({"pad_to_multiple_of": -1}, "pad_to_multiple_of is -1"),
    ):
        with pytest.raises(ValueError, match=expected):
            FastVLMDataCollator(processor, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no samples"):
        FastVLMDataCollator(processor)([])
    processor.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"no \{% generation %\} blocks"):
        FastVLMDataCollator(processor)
    assert FastVLMDataCollator(processor, conversation="plain")


def test_the_collator_goes_to_other_processes(processor: FastVLMProcessor) -> None:
    rows = [sample("Hi?", "Yes.")]
    collator = FastVLMDataCollator(processor, max_length=64)
    expected, batch = collator(rows), pickle.loads(pickle.dumps(collator))(rows)
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
