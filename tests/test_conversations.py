# SPDX-License-Identifier: Apache-2.0
"""Conversations: the golden prompts and label masks, the order of images, videos, and errors."""

import base64
import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2.nodes
import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers.utils.chat_template_utils import _compile_jinja_template

from helpers import expand, golden_images
from transformers_fastvlm import FastVLMProcessor
from transformers_fastvlm.conversations import answer_mask, plain_message
from transformers_fastvlm.images.videos import spread
from transformers_fastvlm.processing_fastvlm import chat_template_for

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
CHATML = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PART = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize("name", ["qwen2_tied", "llama"])
@pytest.mark.parametrize("parts", [True, False])
def test_golden_prompts(golden: Path, processors: Callable[[str], FastVLMProcessor], name: str, parts: bool) -> None:
    cases = json.loads((golden / name / "expected.json").read_text())

    def first(question: str, images: int) -> dict[str, Any]:
        if parts:
            return {"role": "user", "content": [PART] * images + [text(question)]}
        return {"role": "user", "content": "<image>\n" * images + question}

    def said(role: str, words: str) -> dict[str, Any]:
        return {"role": role, "content": [text(words)] if parts else words}

    chats = {
        "single0": [first("Describe the image.", 1)],
        "single1": [first("What number is on the sign?", 1)],
        "two_images": [first("How many dogs are there, and what colour is the sign?", 2)],
        "multi_turn": [
            first("Describe the image.", 1),
            said("assistant", "A cat."),
            said("user", "What number is on the sign?"),
        ],
        "text_only": [said("user", "Read the text.")],
    }
    for key, chat in chats.items():
        assert processors(name).apply_chat_template(chat, add_generation_prompt=True) == cases[key]["prompt"]


def messages_of(sample: dict[str, Any], parts: bool) -> list[dict[str, Any]]:
    """A LLaVA sample as messages, its image in place or as a part."""
    roles = {"human": "user", "gpt": "assistant"}
    messages = []
    for turn in sample["conversations"]:
        content: Any = turn["value"]
        if parts and "<image>" in content:
            before, after = content.split("<image>")
            content = [text(before), PART, text(after)]
        messages.append({"role": roles[turn["from"]], "content": content})
    return messages


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("return_tensors", ["pt", None])
def test_golden_label_masks(
    golden: Path, processor: FastVLMProcessor, parts: bool, side: str, return_tensors: str | None
) -> None:
    """assistant_masks equals the reference's labels, with the placeholders expanded and padding on either side."""
    sft = json.loads((golden / "training.json").read_text())["sft"]
    chats = [messages_of(sample, parts) for sample in sft["samples"]]
    images = [[str(golden / "images" / sample["image"])] if "image" in sample else [] for sample in sft["samples"]]
    if parts:
        for chat, row in zip(chats, images, strict=True):
            if row:
                chat[0]["content"][1] = {"type": "image", "path": row[0]}
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors=return_tensors,
        processor_kwargs={"padding": True, "padding_side": side} | ({} if parts else {"images": images}),
    )
    assert set(inputs) == {"input_ids", "attention_mask", "assistant_masks", "pixel_values"}
    if return_tensors == "pt":
        assert all(isinstance(value, torch.Tensor) for value in inputs.values())
    for row, sample in enumerate(sft["samples"]):
        real = np.asarray(inputs["attention_mask"][row]).astype(bool)
        ids, mask = np.asarray(inputs["input_ids"][row]), np.asarray(inputs["assistant_masks"][row])
        assert not mask[~real].any()
        kept = np.asarray(sft["attention_mask"][row]).astype(bool)
        reference = np.asarray(sft["input_ids"][row])[kept].tolist()
        learned = (np.asarray(sft["labels"][row])[kept] != -100).astype(int).tolist()
        lengths = [16] * ("image" in sample)
        assert ids[real].tolist() == expand(reference, lengths, processor.image_token_id)
        in_place = [-200 if token == -200 else keep for token, keep in zip(reference, learned, strict=True)]
        assert mask[real].tolist() == expand(in_place, lengths, processor.image_token_id, fill=0)


def test_vicuna_learns_answer_and_end(processors: Callable[[str], FastVLMProcessor], image: Image.Image) -> None:
    processor = processors("llama")
    chat = [
        *user({"type": "image", "image": image}, text("What?")),
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": [text("A dog.")]},
    ]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    learned = [token for token, keep in zip(inputs["input_ids"][0], inputs["assistant_masks"][0], strict=True) if keep]
    # "</s>" is not a token of this tokenizer: its ">" and the "U" of the next turn stay apart.
    assert processor.decode(learned) == " A cat.</s> A dog.</s>"
    prompt = processor.apply_chat_template(chat)
    assert prompt == f"{VICUNA}USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: And? ASSISTANT: A dog.</s>"


def test_mask_without_images_and_options(processor: FastVLMProcessor) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A cat."}]
    kwargs: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template(chat, **kwargs)
    learned = [token for token, keep in zip(inputs["input_ids"][0], inputs["assistant_masks"][0], strict=True) if keep]
    assert processor.decode(learned) == "A cat.<|im_end|>\n"
    named = processor.apply_chat_template(chat, chat_template=processor.chat_template, **kwargs)
    assert named["assistant_masks"] == inputs["assistant_masks"]
    assert isinstance(processor.apply_chat_template(chat, tokenize=True, return_assistant_tokens_mask=True)[0], list)
    with pytest.raises(ValueError, match="continue_final_message"):
        processor.apply_chat_template(chat, continue_final_message=True, **kwargs)


# Templates

PLACEMENT = [
    ([PART, text("Q")], "<image>\nQ"),
    ([text("Q"), PART], "<image>\nQ"),
    ([text(" Q \n"), PART], "<image>\nQ"),
    ([text("A"), PART, text("B")], "<image>\nA\nB"),
    ([text("A\n"), PART, text("B")], "<image>\nA\nB"),
    ([PART], "<image>"),
    ([PART, text("")], "<image>"),
    ([PART, PART], "<image>\n<image>"),
    ([PART, PART, text("Q")], "<image>\n<image>\nQ"),
    ([text("A:"), PART, text("B:"), PART, text("Q")], "A:\n<image>\nB:\n<image>\nQ"),
    ([text("A:\n"), PART, text("\nB:"), PART], "A:\n<image>\nB:\n<image>"),
    ([text("A"), text(" B")], "A B"),
    ([text("  A ")], "  A "),
    (["Q", PART], "<image>\nQ"),
    ([{"text": "Q"}, {"type": "image_url", "image_url": {"url": "a.png"}}], "<image>\nQ"),
    ([{"type": "image", "image": None, "url": "a.png"}, {"type": "text", "text": "Q", "url": None}], "<image>\nQ"),
    ("Q", "Q"),
    (" Q ", " Q "),
    ("<image>\nQ", "<image>\nQ"),
    ("Q\n<image>", "<image>\nQ"),
    ("A\n<image>\nB", "<image>\nA\n\nB"),
    ("<image>", "<image>"),
    ("<image>A<image>", "<image>A<image>"),
    ([text("Q\n<image>")], "<image>\nQ"),
    ("", ""),
    ([], ""),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), PLACEMENT)
@pytest.mark.parametrize("name", ["qwen2_tied", "llama"])
def test_images_in_a_turn(
    processors: Callable[[str], FastVLMProcessor], name: str, content: Any, expected: str
) -> None:
    chat = [{"role": "user", "content": content}]
    before = copy.deepcopy(chat)
    rendered = processors(name).apply_chat_template(chat, add_generation_prompt=True)
    if name == "llama":
        assert rendered == f"{VICUNA}USER: {expected} ASSISTANT:"
    else:
        assert rendered == f"{CHATML}<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n"
    assert chat == before


@pytest.mark.parametrize("content", ["Be brief.", [text("Be "), text("brief.")]])
def test_system_message(processors: Callable[[str], FastVLMProcessor], content: Any) -> None:
    chat = [{"role": "system", "content": content}, {"role": "user", "content": "Hi"}]
    assert processors("qwen2_tied").apply_chat_template(chat) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    assert processors("llama").apply_chat_template(chat, add_generation_prompt=True) == "Be brief. USER: Hi ASSISTANT:"


def test_continued_answer(processors: Callable[[str], FastVLMProcessor]) -> None:
    chat = [*user(PART, text("What?")), {"role": "assistant", "content": [text("It is a")]}]
    rendered = processors("qwen2_tied").apply_chat_template(chat, continue_final_message=True)
    assert rendered.endswith("<|im_start|>assistant\nIt is a")
    assert processors("llama").apply_chat_template(chat, continue_final_message=True).endswith("ASSISTANT: It is a")


@pytest.mark.parametrize("name", ["qwen2_tied", "llama"])
def test_template_errors(processors: Callable[[str], FastVLMProcessor], name: str) -> None:
    processor = processors(name)
    with pytest.raises(Exception, match="has no place for tools"):
        processor.apply_chat_template([{"role": "user", "content": "Hi"}], tools=[{"type": "function"}])
    # Engines render the template themselves, without the processor's checks.
    with pytest.raises(Exception, match="type audio"):
        processor.tokenizer.apply_chat_template(user({"type": "audio"}), tokenize=False)
    with pytest.raises(Exception, match="expected an image, or text with its text"):
        processor.tokenizer.apply_chat_template(user({"type": "text"}), tokenize=False)
    if name == "llama":
        with pytest.raises(Exception, match="system message only as the first"):
            processor.apply_chat_template([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])
        with pytest.raises(Exception, match="role tool"):
            processor.tokenizer.apply_chat_template([{"role": "tool", "content": "a"}], tokenize=False)


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_template_iterates_over_content(model_type: str) -> None:
    """Servers detect by this loop in the template that contents may be lists of parts."""
    template = chat_template_for(model_type)
    tree = _compile_jinja_template(template).environment.parse(template)
    loops = [loop.iter for loop in tree.find_all(jinja2.nodes.For)]
    assert any(isinstance(one, jinja2.nodes.Name) and one.name == "messages" for one in loops)
    assert any(isinstance(one, jinja2.nodes.Getitem) and one.node.name == "message" for one in loops)


def test_template_of_text_model() -> None:
    assert "ASSISTANT" in chat_template_for("llama")
    assert chat_template_for("qwen2") == chat_template_for("qwen3")
    assert "<|im_start|>" in chat_template_for("qwen3")


# Conversations with images


@pytest.mark.parametrize("key", ["image", "path", "url", "base64"])
def test_image_sources_in_messages(processor: FastVLMProcessor, golden: Path, image: Image.Image, key: str) -> None:
    path = golden / "images" / "wide_rgb.png"
    source = {
        "image": image,
        "path": str(path),
        "url": str(path),
        "base64": base64.b64encode(path.read_bytes()).decode(),
    }[key]
    chat = user({"type": "image", key: source}, text("Describe the image."))
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    case = json.loads((golden / "qwen2_tied" / "expected.json").read_text())["single0"]
    assert inputs["input_ids"][0].tolist() == expand(case["input_ids"], [16], processor.image_token_id)
    expected = processor(text=case["prompt"], images=image, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_batch_of_conversations(processor: FastVLMProcessor, golden: Path) -> None:
    """One image, two, and none."""
    names = ["wide_rgb.png", "tall_rgb.jpg", "palette_p.png"]
    images = [{"type": "image", "path": str(golden / "images" / name)} for name in names]
    chats = [user(images[0], text("A?")), user(text("B?")), user(images[1], images[2], text("C?"))]
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum(-1).tolist() == [16, 0, 32]
    expected = processor.image_processor(golden_images(golden, names), return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)


def test_options_of_the_call_in_a_conversation(
    processor: FastVLMProcessor, image: Image.Image, capfd: pytest.CaptureFixture[str]
) -> None:
    chat = user({"type": "image", "image": image}, text("Q"))
    both: dict[str, Any] = {"size": 128, "processor_kwargs": {"padding": True}}
    for kwargs in ({"processor_kwargs": {"size": 128}}, {"size": 128}, both):
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)
        assert inputs["pixel_values"].shape == (1, 3, 128, 128)
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
    assert capfd.readouterr().err == ""


def test_conversation_is_not_changed(processor: FastVLMProcessor, image: Image.Image) -> None:
    chat = user({"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "video", "video": [image] * 3})
    before = copy.deepcopy(chat)
    processor.apply_chat_template(chat)
    assert chat == before


@pytest.mark.parametrize("as_array", [False, True])
def test_video_as_frames(processor: FastVLMProcessor, as_array: bool) -> None:
    frames = [Image.new("RGB", (64, 64), (index, 0, 0)) for index in range(100)]
    video = np.stack([np.asarray(frame) for frame in frames]) if as_array else frames
    chat = user({"type": "video", "video": video}, text("What happens?"))
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (8, 3, 256, 256)
    assert (inputs["pixel_values"][:, 0].amax((-1, -2)) * 255).round().tolist() == [0, 14, 28, 42, 57, 71, 85, 99]
    few = processor.apply_chat_template(chat, tokenize=True, return_dict=True, num_frames=3, return_tensors="pt")
    assert (few["pixel_values"][:, 0].amax((-1, -2)) * 255).round().tolist() == [0, 50, 99]
    prompt = processor.apply_chat_template(chat, num_frames=1)
    assert prompt == f"{CHATML}<|im_start|>user\n<image>\nWhat happens?<|im_end|>\n"
    with pytest.raises(ValueError, match="num_frames is 33; expected 1 to 32"):
        processor.apply_chat_template(chat, num_frames=33)
    with pytest.raises(ValueError, match="no frames"):
        processor.apply_chat_template(user({"type": "video", "video": []}))


@pytest.mark.parametrize("name", ["video.mp4", "video.webm", "video.mkv", "10:30.mp4"])
def test_video_file(name: str, processor: FastVLMProcessor, tmp_path: Path) -> None:
    path = tmp_path / name
    chat = user({"type": "video", "path": str(path)}, text("Q"))
    if importlib.util.find_spec("av") is None:
        path.write_bytes(b"")
        with pytest.raises(ImportError, match="needs av: pip install"):
            processor.apply_chat_template(chat)
        return
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx" if name.endswith("webm") else "mpeg4", rate=10)
        stream.width = stream.height = 64
        for index in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, num_frames=4, return_tensors="pt")
    assert inputs["pixel_values"].shape == (4, 3, 256, 256)
    levels = (inputs["pixel_values"].mean((1, 2, 3)) * 25.5).tolist()
    assert levels == pytest.approx([0, 6, 13, 19], abs=1)  # from the first to the last


@pytest.mark.parametrize("content", [None, b"", b"no video", b"half"], ids=["missing", "empty", "text", "cut"])
def test_video_file_that_cannot_be_read(content: bytes | None, processor: FastVLMProcessor, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mkv"
    if content == b"half":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 64
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
            container.mux(stream.encode())
        path.write_bytes(path.read_bytes()[:200])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"the video '.*clip\.mkv'"):
        processor.apply_chat_template(user({"type": "video", "path": str(path)}), tokenize=True, return_dict=True)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="sanitize_control_tokens came to processors with 5.23"
)
@pytest.mark.parametrize("content", [[PART, text("What is <image>?")], [text("What is <image>?"), PART]])
def test_literal_placeholder_beside_an_image(processor: FastVLMProcessor, image: Image.Image, content: Any) -> None:
    content = [{**part, "image": image} if part is PART else part for part in content]
    with pytest.raises(ValueError, match="The text has 2 <image>, but 1 images"):
        processor.apply_chat_template(user(*content), tokenize=True, return_dict=True)
    inputs = processor.apply_chat_template(
        user(*content), tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    assert inputs["input_ids"][0].count(processor.image_token_id) == 16
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True).count("<image>") == 1
    only = processor.apply_chat_template(
        [{"role": "user", "content": "What is <image>?"}], tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    assert processor.image_token_id not in only["input_ids"][0]
    assert "What is <image>?" in processor.decode(only["input_ids"][0])


@pytest.mark.parametrize("part", [5, {"type": "audio", "audio": "a.wav"}, {"type": "text"}, {}])
def test_unknown_part(processor: FastVLMProcessor, part: Any) -> None:
    with pytest.raises(ValueError, match="A part of a message is"):
        processor.apply_chat_template(user(part))


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("Hi", "conversation is 'Hi'.*expected a list of messages"),
        ([{"role": "tool", "content": "a"}], "role 'tool'; expected 'system', 'user'"),
        ([{"role": "User", "content": "a"}], "role 'User'; expected"),
        ([{"content": "a"}], "role 'None'; expected"),
        ([{"role": "user", "content": None}], "role 'user' has no content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant"}], "role 'assistant' has no content"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}], "role 'assistant' has tool_calls"),
    ],
)
def test_message_that_is_none(processor: FastVLMProcessor, conversation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation)


def test_developer_is_system(processor: FastVLMProcessor) -> None:
    def rendered(role: str) -> Any:
        return processor.apply_chat_template([{"role": role, "content": "Be brief."}, *user(text("Hi"))])

    assert rendered("developer") == rendered("system") and "Be brief." in rendered("system")


def test_a_template_of_the_users_own_may_have_more_roles(processor: FastVLMProcessor) -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    assert processor.apply_chat_template([{"role": "tool", "content": "a"}], chat_template=template) == "tool:a;"


@pytest.mark.parametrize("chat", [[], [[]]])
def test_empty_conversation(processor: FastVLMProcessor, chat: Any) -> None:
    with pytest.raises(ValueError, match="no messages"):
        processor.apply_chat_template(chat)


# Parts


@pytest.mark.parametrize(
    ("total", "wanted", "expected"),
    [(1, 1, [0]), (9, 1, [4]), (3, 8, [0, 1, 2]), (9, 3, [0, 4, 8]), (100, 4, [0, 33, 66, 99])],
)
def test_spread(total: int, wanted: int, expected: list[int]) -> None:
    assert spread(total, wanted) == expected


def test_plain_message_keeps_the_rest() -> None:
    assert plain_message({"role": "assistant", "content": None, "name": "x"}) == {
        "role": "assistant",
        "content": None,
        "name": "x",
    }
    plain = plain_message({"role": "user", "content": ("a", {"type": "image", "path": "p", "image": None, "url": "u"})})
    assert plain["content"] == [text("a"), {"type": "image", "url": "u"}]


def test_answer_mask() -> None:
    """Spans count characters before expansion; a token is supervised if any of its characters is."""
    offsets = [(0, 0), (0, 2), (2, 5), (5, 8), (8, 12), (12, 15)]
    replaced = [{"span": (2, 3), "new_span": (2, 8)}]
    assert answer_mask(offsets, replaced, [(4, 7)]) == [0, 0, 0, 0, 1, 0]
    assert answer_mask(offsets, replaced, [(0, 1), (7, 9)]) == [0, 1, 0, 0, 0, 1]
    assert answer_mask(offsets, [], []) == [0] * 6
