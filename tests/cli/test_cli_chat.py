# SPDX-License-Identifier: Apache-2.0
"""`fastvlm chat`: turns, images, commands."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from transformers_fastvlm import FastViTHDModel, FastVLMModel
from transformers_fastvlm.cli import chat
from transformers_fastvlm.cli.cli_errors import UserError
from transformers_fastvlm.engines import Request, Sampling, TransformersEngine


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """Let the model's answers through and collect the conversations that it was asked to continue."""
    conversations: list[list[dict[str, Any]]] = []
    original = TransformersEngine.stream

    def stream(self: TransformersEngine, conversation: list[dict[str, Any]], *args: Any, **options: Any) -> Request:
        conversations.append(conversation)
        return original(self, conversation, *args, **options)

    monkeypatch.setattr(TransformersEngine, "stream", stream)
    return conversations


def summary(conversation: list[dict[str, Any]]) -> list[str]:
    """Return each message as its role's first letter and its parts, as in "u image What is it?"."""
    lines = []
    for message in conversation:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text", part["type"]) for part in content]
        lines.append(" ".join([message["role"][0], *(["…"] if message["role"] == "assistant" else parts)]))
    return lines


def test_keeps_the_history(checkpoint, golden, run, asked) -> None:
    lines = f"What is it?\n\nAnd now?\n/image {golden / 'images' / 'tall_rgb.jpg'}\nThis?\n/clear\nAgain?\n/exit\nno\n"
    result = run(
        "chat",
        golden / "images" / "wide_rgb.png",
        *("-m", checkpoint("qwen2_untied"), "--max-new-tokens", 4, "--system", "Be brief."),
        stdin=lines,
    )
    assert [summary(conversation) for conversation in asked] == [
        ["s Be brief.", "u image What is it?"],
        ["s Be brief.", "u image What is it?", "a …", "u And now?"],
        ["s Be brief.", "u image What is it?", "a …", "u And now?", "a …", "u image This?"],
        ["s Be brief.", "u image Again?"],
    ]
    answers = result.stdout.splitlines()
    assert len(answers) == 4 and answers[0].strip() == asked[1][2]["content"]


def test_lines_that_are_not_utf8(checkpoint, run, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("chat", "-m", checkpoint("qwen2_untied"), "--max-new-tokens", 4)
    result = run(*words, stdin=b"What?\na\xffb\nAnd?\n", code=2)  # a pipe ends with the first error
    assert result.stderr.splitlines()[-1].startswith("fastvlm: the prompt is not UTF-8") and len(asked) == 1

    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    result = run(*words, stdin=b"a\xffb\nAnd?\n")
    assert "the prompt is not UTF-8" in result.stderr
    assert [summary(conversation) for conversation in asked[1:]] == [["u And?"]]


def test_answers_as_generate_does(checkpoint, golden, run) -> None:
    words = (golden / "images" / "wide_rgb.png", "-m", checkpoint("llama"), "--max-new-tokens", 5)
    assert run("chat", *words, stdin="What is it?").stdout == run("generate", *words, "-p", "What is it?").stdout


def test_an_image_is_encoded_and_prefilled_once(checkpoint, golden, run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three questions and a fresh start about one image, and an answer like that of a chat that begins there."""
    encoded: list[int] = []
    fed: list[int] = []
    encode, feed = FastViTHDModel.forward, FastVLMModel.forward

    @functools.wraps(encode)
    def counted_encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        encoded.append(1)
        return encode(self, *args, **kwargs)

    @functools.wraps(feed)
    def counted_feed(self: Any, *args: Any, **kwargs: Any) -> Any:
        fed.append(kwargs["inputs_embeds"].shape[1])
        return feed(self, *args, **kwargs)

    monkeypatch.setattr(FastViTHDModel, "forward", counted_encode)
    monkeypatch.setattr(FastVLMModel, "forward", counted_feed)
    words = (golden / "images" / "wide_rgb.png", "-m", checkpoint("llama"), "--max-new-tokens", 1)
    lines = run("chat", *words, stdin="What is it?\nAnd now?\nWhy?\n/clear\nWho?").stdout.splitlines()
    assert len(encoded) == 1 and len(fed) == 4
    assert fed[0] > 80 and max(fed[1:]) < 40
    assert run("chat", *words, stdin="Who?").stdout.splitlines() == lines[-1:]


def test_ends_at_the_first_error_of_a_pipe(checkpoint, run) -> None:
    result = run("chat", "-m", checkpoint("llama"), stdin="/image gone.png\nHello\n", code=2)
    assert result.stdout == "" and "no such file: 'gone.png'" in result.stderr


def test_refuses_an_image_from_standard_input(checkpoint, fails) -> None:
    assert "Give a file" in fails("chat", "-", "-m", checkpoint("llama"))


def test_goes_on_after_an_error_of_a_user(
    checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["/image gone.png", "/what", "Say <image>", "/help"])
    monkeypatch.setattr(chat, "_next_line", lambda interactive: next(lines, None))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    chat.chat(images=None, model=str(checkpoint("llama")))
    said = capsys.readouterr().err
    assert "no such file" in said and "unknown command '/what'" in said and "1 <image>, but there are 0" in said
    assert said.count("/clear") == 2  # at the beginning, and for /help


class Engine:
    """Says yes, or fails."""

    error: Exception | None = None

    def stream(self, *_: Any, **__: Any) -> Any:
        if self.error is not None:
            raise self.error
        return Yes(["yes"])


class Yes(list[str]):
    """A request that is answered."""

    def result(self) -> Any:
        return SimpleNamespace(text="yes", finish_reason="stop")


@pytest.fixture
def talk() -> chat._Conversation:
    return chat._Conversation(Engine(), Sampling(), None, [Image.new("RGB", (8, 8))], reading=None)


def test_a_question_that_failed_is_not_part_of_the_conversation(talk: chat._Conversation) -> None:
    talk.engine.error = ValueError("too long")
    with pytest.raises(ValueError, match="too long"):
        talk.turn("A question")
    assert talk.messages == [] and len(talk.images) == 1
    talk.engine.error = None
    assert talk.turn("Another") and summary(talk.messages) == ["u image Another", "a …"] and talk.images == []


@pytest.mark.parametrize("line", ["/image", "/image -", "/unknown"])
def test_refuses_commands(talk: chat._Conversation, line: str) -> None:
    with pytest.raises(UserError):
        talk.turn(line)


def test_a_path_is_not_a_command(talk: chat._Conversation) -> None:
    assert talk.turn("/usr/share is what?") and summary(talk.messages)[0] == "u image /usr/share is what?"


def test_quotes_around_a_path(talk: chat._Conversation, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a picture.png")
    assert talk.turn(f"/image '{tmp_path / 'a picture.png'}'") and len(talk.images) == 2


@pytest.mark.parametrize("line", ["/exit", "/quit", " /exit "])
def test_leaves(talk: chat._Conversation, line: str) -> None:
    assert not talk.turn(line)


def test_reading_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["one\n", ""])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(readline=lambda: next(lines)))
    assert [chat._next_line(True), chat._next_line(False)] == ["one\n", None]
    # Answers may go to a file while the questions are typed.
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "> ")
