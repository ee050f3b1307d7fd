# SPDX-License-Identifier: Apache-2.0
"""The web page's parts without a browser: answers in turn, visitors, images, one turn of a conversation."""

import asyncio
import itertools
import struct
import zlib
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_fastvlm.demo import Page, page_images
from transformers_fastvlm.demo.answering import Answerer, UnusableInput
from transformers_fastvlm.demo.presets import scene_examples
from transformers_fastvlm.demo.visitors import Visitors, summary, turn
from transformers_fastvlm.engines import TransformersEngine
from transformers_fastvlm.engines.continuous_rows import ContinuousRows


@pytest.fixture(scope="module")
def parts(checkpoint: Callable[[str], Path]) -> tuple[Any, Any]:
    directory = checkpoint("qwen2_untied")
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # answers end by their length only
    return model, AutoProcessor.from_pretrained(directory)


@pytest.fixture
def answerer(parts: tuple[Any, Any]) -> Iterator[Answerer]:
    engine = TransformersEngine(*parts, batch_size=1)
    answerer = Answerer(engine, max_new_tokens=6)
    yield answerer
    answerer.close()
    engine.close()


@pytest.fixture
def image(golden: Path) -> str:
    return str(golden / "images" / "wide_rgb.png")


def opened(file: str) -> Image.Image:
    with Image.open(file) as image:
        return image.copy()


def asks(text: str, *images: str) -> dict[str, Any]:
    shown = [{"type": "image", "image": opened(image)} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def expected(parts: tuple[Any, Any], messages: list[dict[str, Any]], length: int = 6) -> str:
    """What plain generate() answers greedily."""
    model, processor = parts
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=length, do_sample=False)
    return str(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


async def texts(reply: Any) -> list[str]:
    return [text async for text in reply]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def show(image: Image.Image, words: str) -> str:
    return f"{words}, {image.width}x{image.height}"


def test_streams_what_generate_answers(answerer: Answerer, parts: tuple[Any, Any], image: str) -> None:
    messages = [asks("What is it?", image)]

    async def ask() -> Any:
        reply = answerer.ask(messages)
        return await texts(reply), reply

    pieces, reply = run(ask())
    assert reply.text == expected(parts, messages) != ""
    assert pieces[-1] == reply.text and all(later.startswith(earlier) for earlier, later in itertools.pairwise(pieces))
    assert reply.done and reply.cut and reply.encoded_images == 1 and reply.first_token_seconds > 0
    assert "image encoded; cut at the maximum" in summary(reply)


def test_a_second_question_computes_only_what_is_new(answerer: Answerer, parts: tuple[Any, Any], image: str) -> None:
    async def talk() -> Any:
        visitor = Visitors(answerer).come("a")
        async for _ in turn(answerer, visitor, "What is it?", [image], show):
            pass
        async for _ in turn(answerer, visitor, "And now?", [], show):
            pass
        return visitor

    visitor = run(talk())
    assert visitor.messages[-1]["content"] == expected(parts, visitor.messages[:-1])
    request: Any = visitor.reply._request
    assert visitor.reply.encoded_images == 0 and 40 < request.cached_tokens > request.prompt.tokens - 50
    assert "image reused" in summary(visitor.reply)
    roles = [(one["role"], one["content"]) for one in visitor.shown]
    assert [role for role, _ in roles] == ["user", "user", "assistant", "user", "assistant"]
    assert roles[0][1].startswith("Your image, ")


def test_answers_of_several_visitors_run_beside_each_other(
    answerer: Answerer, parts: tuple[Any, Any], image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []
    step = ContinuousRows.step
    monkeypatch.setattr(ContinuousRows, "step", lambda self: (running.append(len(self.running)), step(self))[1])
    messages = [asks("What?", image)]
    answerer.engine.batch_size = answerer.max_new_tokens = 60

    async def ask() -> list[str]:
        replies = [answerer.ask(messages) for _ in range(3)]
        await asyncio.gather(*map(texts, replies))
        return [reply.text for reply in replies]

    assert len(set(run(ask()))) == 1
    assert max(running) > 1


def test_stop_keeps_what_there_is(answerer: Answerer, image: str) -> None:
    async def ask() -> Any:
        visitor = Visitors(answerer).come("a")
        answerer.max_new_tokens = 200
        async for _ in turn(answerer, visitor, "What is it?", [image], show):
            if visitor.shown[-1]["role"] == "assistant":
                visitor.stop()
        stopped = visitor.messages[-1]["content"]
        answerer.max_new_tokens = 4
        async for _ in turn(answerer, visitor, "And now?", [], show):
            pass
        return visitor, stopped, answerer.engine.processor.tokenizer

    visitor, stopped, tokenizer = run(ask())
    assert 0 < len(tokenizer(stopped)["input_ids"]) < 200
    assert len(visitor.messages) == 4 and visitor.reply.encoded_images == 0


def test_stop_before_its_turn(answerer: Answerer, image: str) -> None:
    async def ask() -> Any:
        first, second = answerer.ask([asks("a", image)]), answerer.ask([asks("b", image)])
        second.stop()
        return await texts(first), await texts(second), second

    first, second, reply = run(ask())
    assert first and second == [] and reply.done and summary(reply) == "Stopped."


def test_too_long_is_told_in_terms_of_the_page(answerer: Answerer, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answerer.engine.processor, "context_length", 8)

    async def ask() -> None:
        await texts(answerer.ask([asks("What is it?", image)]))

    with pytest.raises(UnusableInput, match=r"has become too long.* the model reads 8\. Start a new one"):
        run(ask())


def test_an_answer_ends_where_the_context_does(
    answerer: Answerer, parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = parts[1].apply_chat_template([asks("Hi")], add_generation_prompt=True, tokenize=True, return_dict=True)
    monkeypatch.setattr(parts[1], "context_length", len(prompt["input_ids"][0]) + 2)

    async def ask() -> Any:
        reply = answerer.ask([asks("Hi")])
        await texts(reply)
        return reply

    assert run(ask()).cut


def test_a_placeholder_in_the_text_is_an_error(answerer: Answerer) -> None:
    async def ask() -> None:
        await texts(answerer.ask([asks("Say <image>")]))

    with pytest.raises(UnusableInput, match="is meant as text"):
        run(ask())


def test_what_the_model_raises_reaches_the_one_who_asked(
    answerer: Answerer, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ContinuousRows, "step", lambda rows: 1 / 0)

    async def ask() -> Any:
        visitor = Visitors(answerer).come("a")
        with pytest.raises(ZeroDivisionError):
            async for _ in turn(answerer, visitor, "What is it?", [image], show):
                pass
        return visitor

    visitor = run(ask())
    assert visitor.messages == visitor.shown == [] and not visitor.waits


def test_a_new_image_starts_over_and_an_error_changes_nothing(answerer: Answerer, image: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(image).read_bytes()[:400])

    async def talk() -> Any:
        visitor = Visitors(answerer).come("a")
        for question, files in (("One?", [image]), ("Two?", []), ("Three?", [image, image])):
            async for _ in turn(answerer, visitor, question, files, show, system="Be brief."):
                pass
        kept = visitor.messages, visitor.shown
        with pytest.raises(UnusableInput, match=r"The image 'broken\.png' is truncated"):
            async for _ in turn(answerer, visitor, "Four?", [str(broken)], show):
                pass
        assert (visitor.messages, visitor.shown) == kept
        visitor.reply = answerer.ask([asks("Hi")])
        with pytest.raises(UnusableInput, match="still running"):
            async for _ in turn(answerer, visitor, "Five?", [], show):
                pass
        with pytest.raises(UnusableInput, match="20001 characters"):
            async for _ in turn(answerer, visitor, "x" * 20001, [], show):
                pass
        return visitor

    visitor = run(talk())
    assert [part["type"] for part in visitor.messages[0]["content"]] == ["image", "image", "text"]
    assert [one["content"].split(",")[0] for one in visitor.shown[:3]] == [
        "Your image 1 of 2",
        "Your image 2 of 2",
        "Three?",
    ]


def test_a_visitor_who_leaves_frees_everything(answerer: Answerer, image: str) -> None:
    answerer.max_new_tokens = 200
    visitors = Visitors(answerer, most=2)

    async def talk() -> Any:
        visitor = visitors.come("a")
        async for _ in turn(answerer, visitor, "What is it?", [image], show):
            if visitor.shown and visitor.shown[-1]["role"] == "assistant":
                visitors.leave("a")
        return visitor

    visitor = run(talk())
    tokenizer = answerer.engine.processor.tokenizer
    answerer.engine.close()  # what was asked of it before is done
    assert visitor.reply.stopped and len(tokenizer(visitor.reply.text)["input_ids"]) < 200
    assert visitor.messages == visitor.shown == [] and len(visitors) == 0


def test_visitors(answerer: Answerer) -> None:
    visitors = Visitors(answerer, most=2)
    first, second = visitors.come("a"), visitors.come("b")
    assert visitors.of("a") is first is not second
    visitors.come("c")  # b was silent longest
    assert list(visitors) == ["a", "c"]
    with pytest.raises(UnusableInput, match="Press New conversation"):
        visitors.of("b")
    visitors.leave("nobody")


def png(width: int, height: int) -> bytes:
    """A PNG that says it has this size, with hardly any content."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    content = zlib.compress(bytes(width // 8 + 1) * min(height, 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"The image 'it\.png' is empty"),
        (b"<svg></svg>", r"The image 'it\.png' is an SVG drawing"),
        (png(60000, 60000), r"The image 'it\.png' is .*60000"),
        (png(9000, 9000), "81 million pixels together"),
    ],
)
def test_images_that_cannot_be_used(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "it.png"
    path.write_bytes(content)
    with pytest.raises(UnusableInput, match=reason):
        page_images.read_images([str(path)])


def test_too_many_images(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnusableInput, match="9 images are too many at once; send up to 8"):
        page_images.read_images([image] * 9)
    monkeypatch.setattr(page_images, "MAX_PIXELS", 1000)
    with pytest.raises(UnusableInput, match="million pixels together"):
        page_images.read_images([image])


def test_images_are_upright_and_any_browser_can_show_them(tmp_path: Path) -> None:
    image = Image.new("CMYK", (1600, 800))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.tif", exif=exif)
    (read,) = page_images.read_images([str(tmp_path / "turned.tif")])
    assert read.size == (800, 1600)
    shown = page_images.save_small(read, tmp_path)
    with Image.open(shown) as small:
        assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (384, 768))


@pytest.mark.parametrize(
    "frame",
    [None, "x", {"path": "/etc/passwd"}, {"url": "/etc/passwd"}, {"url": "http://localhost/x.png"}, {"url": "data:,x"}],
)
def test_frames_are_data_only(frame: Any) -> None:
    with pytest.raises(UnusableInput, match="sent no image"):
        page_images.read_frame(frame)


def test_a_damaged_frame(image: str) -> None:
    with pytest.raises(UnusableInput, match="An image of the camera cannot be read"):
        page_images.read_frame({"url": "data:image/png;base64,iVBORw0KGgo="})


def test_says_how_to_install_what_is_missing(parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "transformers-fastvlm\[demo\]"'):
        Page(TransformersEngine(*parts), name="tiny")


def test_examples_are_scenes_of_the_kinds_that_the_tiny_model_knows(tmp_path: Path) -> None:
    examples = scene_examples(tmp_path)
    assert len({one.question for one in examples}) == len(examples) == 4
    assert all(one.image.parent == tmp_path and one.image.is_file() for one in examples)
