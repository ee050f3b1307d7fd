# SPDX-License-Identifier: Apache-2.0
"""What a request may say, without a server: bounds of its JSON, and what each field means."""

import json
from pathlib import Path
from typing import Any

import pytest

from transformers_fastvlm.server.api_errors import ApiError
from transformers_fastvlm.server.json_bodies import parse_json
from transformers_fastvlm.server.protocol import FIELDS, ChatRequest, parse_chat
from transformers_fastvlm.server.settings import Settings

SETTINGS = Settings(name="tiny", max_images=2)


def parsed(**fields: Any) -> ChatRequest:
    """Return a request with one message and further fields."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields
    return parse_chat(parse_json(json.dumps(body).encode()), SETTINGS)


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        (b"[" + b"[]," * 30_000 + b"[]]", 413, "The body has 60002 of the characters [ { , and : together"),
        (b'{"a":"' + b":" * 20_001 + b'"}', 413, "this server accepts 20000"),
        (nested(33), 400, "nested too deeply; this server accepts 32 levels"),
        (nested(9000), 400, "nested too deeply"),
        (b'{"model": "a", "model": "b"}', 400, "an object has the key 'model' twice"),
        (b'{"a": {"role": 1, "x": 2, "role": 1}}', 400, "an object has the key 'role' twice"),
        (b'{"seed": ' + b"1" * 5000 + b"}", 400, "a number of 5000 characters; this server accepts up to 100"),
        (b'{"seed": 0.' + b"1" * 5000 + b"}", 400, "a number of 5002 characters"),
        (b'{"temperature": 1e999}', 400, "1e999 is too large for a number"),
        (b'{"temperature": -Infinity}', 400, "-Infinity is not a number in JSON"),
        (b"\xff\xfe{\x00", 400, "not UTF-8"),
        (b'{"a": 1', 400, "is not JSON"),
    ],
    ids=lambda value: "long" if isinstance(value, bytes) and len(value) > 40 else str(value),
)
def test_a_body_that_is_refused(body: bytes, status: int, part: str) -> None:
    with pytest.raises(ApiError) as error:
        parse_json(body)
    assert error.value.status == status and part in error.value.message
    assert len(error.value.message) < 300


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (nested(32), json.loads(nested(32))),
        (b"\xef\xbb\xbf{}", {}),  # as some editors write it
        (b'{"a": "' + b"\\\\" * 100_000 + b'"}', {"a": "\\" * 100_000}),
        (b'{"a": {"b": 1}, "b": -1.5e3}', {"a": {"b": 1}, "b": -1500.0}),
        (b"[" + b"1," * 19_000 + b"1]", [1] * 19_001),
    ],
    ids=["deep", "order of bytes", "escapes", "a key in two objects", "many"],
)
def test_a_body_that_is_taken(body: bytes, value: Any) -> None:
    assert parse_json(body) == value


def message(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content} | fields


def texts(count: int) -> list[dict[str, Any]]:
    return [{"type": "text", "text": "a"}] * count


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"seed": 2**63}, "seed", "expected -9223372036854775808 to 9223372036854775807"),
        ({"temperature": 2.1}, "temperature", "a number from 0 to 2"),
        ({"temperature": -1e-9}, "temperature", "a number from 0 to 2"),
        (
            {"messages": [message([{"type": "image_url", "image_url": "https://x/a.png"}])]},
            "messages[0].content[0].image_url",
            "is 'https://x/a.png'; expected an object {\"url\": ",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "system, developer, user or assistant"),
        ({"messages": [message(role="system")]}, "messages[0]", "The last message has role system"),
        (
            {"messages": [message(), message(role="assistant")], "add_generation_prompt": True},
            "add_generation_prompt",
            "expected false, because the last message has role assistant",
        ),
        ({"continue_final_message": True}, "continue_final_message", "expected false, because the last message"),
        ({"messages": [message(tool_calls=[{}])]}, "messages[0].tool_calls", "it calls no tools"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", ""),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more", "leave it out"),
        ({"messages": [message()] * 1001}, "messages", "The request has 1001 messages; this server accepts 1000"),
        (
            {"messages": [message(texts(600)), message(texts(401))]},
            "messages",
            "has 1001 parts; this server accepts 1000",
        ),
    ],
)
def test_a_field_that_is_refused(fields: dict[str, Any], param: str, part: str) -> None:
    with pytest.raises(ApiError) as error:
        parsed(**fields)
    assert error.value.status == 400 and error.value.param == param and part in error.value.message


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (0, 0.0),
        (1e-45, 0.0),
        (5e-324, 0.0),
        (1e-30, 0.0),
        (9.9e-5, 0.0),
        (1e-4, 1e-4),
        (0.7, 0.7),
        (2, 2.0),
        (None, 0.0),
    ],
)
def test_a_temperature_close_to_zero_is_greedy(given: float | None, meant: float) -> None:
    assert parsed(temperature=given).temperature == meant


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [message(name="user_proxy")]},
        {"messages": [message(cache_control={"type": "ephemeral"})]},
        {"messages": [message([{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}])]},
        {"reasoning_effort": "low", "verbosity": "high"},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "safety_identifier": "x"},
        {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "prediction": {"type": "content", "content": "a"}},
        {"modalities": ["text"], "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "audio": None},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
    ],
    ids=str,
)
def test_what_changes_nothing_is_taken(fields: dict[str, Any]) -> None:
    assert parsed(**fields).messages == parsed().messages


def test_every_field_of_the_client_is_in_the_table() -> None:
    """A field that a later version of the client has is looked at, and then written into the table."""
    types = pytest.importorskip("openai.types.chat.completion_create_params", reason="openai is not installed")
    streaming = types.CompletionCreateParamsStreaming.__annotations__.keys()
    known = types.CompletionCreateParamsBase.__annotations__.keys() | streaming
    assert known - FIELDS.keys() == set()
    assert FIELDS.keys() - known == {"add_generation_prompt", "continue_final_message"}


def test_the_page_lists_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve-api.md").read_text(encoding="utf-8")
    lists = dict(zip(("taken", "ignored", "refused"), page.split("\n## ")[1:4], strict=True))
    for name, support in FIELDS.items():
        assert f"`{name}`" in lists[support if isinstance(support, str) else "refused"], name


@pytest.mark.parametrize("name", sorted(name for name, support in FIELDS.items() if not isinstance(support, str)))
def test_a_field_that_is_not_supported_is_refused_by_name(name: str) -> None:
    with pytest.raises(ApiError) as error:
        parsed(**{name: {"type": "something"}})
    assert error.value.status == 400 and error.value.param == name and error.value.code == "unsupported_parameter"
    assert error.value.message.startswith(f"{name} is not supported by this server: it ")


def test_a_last_message_of_the_assistant_is_continued() -> None:
    parts = [{"type": "text", "text": "The bar "}, {"type": "text", "text": "is"}]
    found = parsed(messages=[message(), {"role": "assistant", "content": parts}], continue_final_message=True)
    assert found.continues and found.messages[-1]["content"] == [{"type": "text", "text": "The bar is"}]
    assert not parsed(add_generation_prompt=True, continue_final_message=False).continues


def test_a_developer_is_the_system() -> None:
    found = parsed(messages=[{"role": "developer", "content": "Be short."}, message()]).messages
    assert [one["role"] for one in found] == ["system", "user"]


def test_a_request_within_the_bounds_is_taken() -> None:
    assert len(parsed(messages=[message()] * 1000).messages) == 1000
    assert len(parsed(messages=[message(texts(1000))]).messages[0]["content"]) == 1000


def test_a_message_shows_the_beginning_of_a_value_only() -> None:
    with pytest.raises(ApiError) as error:
        parsed(temperature=["x" * 1_000_000] * 3)
    assert error.value.message.startswith('temperature is ["xxx') and len(error.value.message) < 200
