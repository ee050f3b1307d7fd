# SPDX-License-Identifier: Apache-2.0
"""`/v1/responses`: OpenAI's client gets the answers of chat completions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("openai", reason="openai is not installed")

import openai
from http_running import Running, data_url, load_tiny, running, shows, until

from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.server.api_errors import ApiError
from transformers_fastvlm.server.response_objects import RESPONSE_FIELDS, parse_response
from transformers_fastvlm.server.settings import Settings


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(*load_tiny(), max_answer_tokens=64) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    with server.client() as one:
        yield one


@pytest.fixture(scope="module")
def scene() -> tuple[str, str]:
    """The URL of an image, and a question about it."""
    row = SceneDataset(1, seed=7, task="captions")[0]
    return data_url(row["images"][0]), row["messages"][0]["content"].removeprefix("<image>\n")


@pytest.fixture(scope="module")
def expected(client: Any, scene: tuple[str, str]) -> str:
    """The answer of chat completions."""
    answered = client.chat.completions.create(model="tiny", messages=[shows(*scene)])
    text: str = answered.choices[0].message.content
    assert len(text) > 20
    return text


def asked(scene: tuple[str, str]) -> list[dict[str, Any]]:
    url, text = scene
    parts = [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_the_answer_is_that_of_chat_completions(client: Any, scene: tuple[str, str], expected: str) -> None:
    response = client.responses.create(model="tiny", input=asked(scene))
    assert response.output_text == expected and response.status == "completed"
    assert response.id.startswith("resp_") and response.usage.input_tokens > 16
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    # A text alone, with instructions, is a system message and a user's.
    alone = client.responses.create(model="tiny", input="What color?", instructions="Be short.", max_output_tokens=8)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What color?"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    assert alone.output_text == chat.choices[0].message.content
    assert alone.usage.input_tokens == chat.usage.prompt_tokens


def test_a_stream_has_the_events_of_a_response(client: Any, scene: tuple[str, str], expected: str) -> None:
    events = list(client.responses.create(model="tiny", input=asked(scene), stream=True))
    kinds = [event.type for event in events]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds[:4] == [f"response.{kind}" for kind in begin] and kinds[-4:] == [f"response.{kind}" for kind in end]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == expected == events[-4].text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == expected
    with client.responses.stream(model="tiny", input=asked(scene)) as stream:
        assert stream.get_final_response().output_text == expected


def test_an_answer_that_was_cut_is_incomplete(client: Any, scene: tuple[str, str], expected: str) -> None:
    cut = client.responses.create(model="tiny", input=asked(scene), max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert expected.startswith(cut.output_text) and cut.usage.output_tokens == 3


def test_an_answer_follows_a_schema(client: Any, scene: tuple[str, str]) -> None:
    schema = {"type": "object", "properties": {"count": {"type": "integer", "maximum": 9}}, "required": ["count"]}
    form = {"type": "json_schema", "name": "count", "strict": True, "schema": schema | {"additionalProperties": False}}
    response = client.responses.create(model="tiny", input=asked(scene), text={"format": form})
    assert json.loads(response.output_text)["count"] <= 9


def test_an_answer_can_be_asked_about(client: Any, scene: tuple[str, str], expected: str) -> None:
    first = client.responses.create(model="tiny", input=asked(scene))
    again = [*asked(scene), *[item.model_dump(exclude_none=True) for item in first.output]]
    more = client.responses.create(model="tiny", input=[*again, {"role": "user", "content": "How many?"}])
    messages = [shows(*scene), {"role": "assistant", "content": expected}, {"role": "user", "content": "How many?"}]
    chat = client.chat.completions.create(model="tiny", messages=messages)
    assert more.output_text == chat.choices[0].message.content


def test_nothing_is_stored(client: Any, server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id is not supported by this server: it stores"):
        client.responses.create(model="tiny", input="a", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
    assert client.responses.create(model="tiny", input="a", store=True, max_output_tokens=1).store is False
    until(lambda: server.service.active == 0)


def test_every_field_of_the_client_is_in_the_table() -> None:
    from openai.types.responses import response_create_params as types

    streaming = types.ResponseCreateParamsStreaming.__annotations__.keys()
    assert types.ResponseCreateParamsBase.__annotations__.keys() | streaming == RESPONSE_FIELDS.keys()
    page = (Path(__file__).parents[2] / "docs" / "serve-api.md").read_text(encoding="utf-8").split("\n## ")
    (section,) = [section for section in page if section.startswith("Responses")]
    taken_or_ignored = [name for name, support in RESPONSE_FIELDS.items() if isinstance(support, str)]
    assert [name for name in taken_or_ignored if f"`{name}`" not in section] == []


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"input": None}, "input", "input is missing"),
        ({"input": []}, "input", "input is missing"),
        ({"input": 3}, "input", "expected a list"),
        ({"input": [3]}, "input[0]", "an object with role and content"),
        ({"input": [{"type": "function_call_output"}]}, "input[0].type", "this server calls no tools"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type", "input_image"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].image_url",
            "missing",
        ),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role", "user or assistant"),
        ({"tools": [{"type": "web_search"}]}, "tools", "it calls no tools"),
        ({"background": True}, "background", "answers while the client waits"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "text, json_object or json_schema"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "is missing"),
        ({"max_output_tokens": 0}, "max_output_tokens", "expected 1 to"),
        ({"seed": 1}, "seed", "is not supported"),
    ],
)
def test_a_field_that_is_refused(fields: dict[str, Any], param: str, part: str) -> None:
    with pytest.raises(ApiError) as error:
        parse_response({"model": "tiny", "input": "a"} | fields, Settings(name="tiny"))
    assert error.value.status == 400 and error.value.param == param and part in error.value.message
