# SPDX-License-Identifier: Apache-2.0
"""What the operator of a server sees: /metrics, and a line of the log for each request."""

import json
import logging
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from http_running import Running, asks, data_url, load_tiny, never_ending, request_bytes, running, shows, until

from transformers_fastvlm.server.request_log import JsonLines

SECRET = "secret-key"
WORDS = "What about the zebra?"


@pytest.fixture(scope="module")
def model_and_processor() -> tuple[Any, Any]:
    return load_tiny()


@pytest.fixture
def server(model_and_processor: tuple[Any, Any]) -> Iterator[Running]:
    with running(*model_and_processor, api_key=SECRET, batch_size=2) as one:
        yield one


def values(server: Running, **headers: str) -> dict[str, float]:
    """Return the samples of /metrics, by name and labels."""
    request = urllib.request.Request(f"{server.url}/metrics", headers=headers)
    with urllib.request.urlopen(request) as response:
        assert response.headers["content-type"].startswith("text/plain; version=")
        lines = response.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name.removeprefix("fastvlm_"): float(value) for name, _, value in samples}


def with_key(server: Running, **fields: Any) -> int:
    return server.post(asks(WORDS, **fields), Authorization=f"Bearer {SECRET}")[0]


def test_metrics_count_what_happened(server: Running) -> None:
    key = {"Authorization": f"Bearer {SECRET}"}
    before = values(server, **key)
    assert before["prompt_tokens_total"] == before["rows_running"] == before["rows_waiting"] == 0
    shown = {"model": "tiny", "messages": [shows(data_url(Image.new("RGB", (32, 32))), WORDS)], "max_tokens": 2}
    status, answer, _ = server.post(shown, **key)
    assert status == 200
    assert with_key(server, max_tokens=1, stream_options={}) == 400
    assert with_key(server, temperature=9) == 400
    assert with_key(server, model="other") == 404
    assert server.post(asks())[0] == 401
    server.get("/made/up"), server.get("/made/up/too")
    until(lambda: server.service.active == 0)
    found = values(server, **key)
    chat = 'endpoint="/v1/chat/completions",status='
    assert [found[f'requests_total{{{chat}"{code}"}}'] for code in (200, 400, 401, 404)] == [1, 2, 1, 1]
    assert found['requests_total{endpoint="other",status="404"}'] == 2
    assert found['requests_refused_total{reason="model_not_found"}'] == 1
    assert found['requests_refused_total{reason="invalid_value"}'] == 1
    assert found["prompt_tokens_total"] == answer["usage"]["prompt_tokens"]
    assert found["completion_tokens_total"] == answer["usage"]["completion_tokens"]
    assert found[f'answers_total{{finish_reason="{answer["choices"][0]["finish_reason"]}"}}'] == 1
    assert found["time_to_first_token_seconds_count"] == found["request_seconds_count"] == 1
    assert 0 < found["time_to_first_token_seconds_sum"] < found["request_seconds_sum"]
    assert found["held_bytes"] == found["held_images"] == found["requests_active"] == 0
    assert not any(word in name for name in found for word in (SECRET, "zebra", "made", "127.0.0.1"))


def test_metrics_show_what_runs_and_waits() -> None:
    model, processor = load_tiny()
    with running(never_ending(model), processor, max_answer_tokens=1500, batch_size=1, queue=4) as server:
        image = data_url(Image.new("RGB", (32, 32)))
        shown = {"model": "tiny", "messages": [shows(image, WORDS)], "stream": True}
        connections = [server.connect() for _ in range(4)]
        for connection in connections:
            connection.sendall(request_bytes(server.port, shown))
        names = ("rows_running", "rows_waiting", "requests_active")
        until(lambda: [values(server)[name] for name in names] == [1, 3, 4])
        found = values(server)
        assert found["held_images"] == 4 and found["held_bytes"] > 4 * 3 * 32 * 32
        for connection in connections:
            connection.close()
        until(lambda: server.service.active == 0)
        found = values(server)
        assert found['requests_total{endpoint="/v1/chat/completions",status="499"}'] == 4
        assert found["held_images"] == found["held_bytes"] == 0


@pytest.mark.parametrize(("is_open", "status"), [(False, 401), (True, 200)])
def test_metrics_need_the_key_unless_they_are_open(
    model_and_processor: tuple[Any, Any], is_open: bool, status: int
) -> None:
    with running(*model_and_processor, api_key=SECRET, open_metrics=is_open) as server:
        if is_open:
            assert values(server)["rows_running"] == 0
        else:
            assert server.get("/metrics")[0] == status


def test_a_line_of_json_for_each_request(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "transformers_fastvlm.server")
    image = data_url(Image.new("RGB", (32, 32)))
    shown = {"model": "tiny", "messages": [shows(image, WORDS)], "max_tokens": 2, "n": 2, "temperature": 1, "seed": 1}
    status, answer, _ = server.post(shown, Authorization=f"Bearer {SECRET}")
    assert status == 200 and with_key(server, seed="zebra") == 400
    until(lambda: len(caplog.records) == 2)
    lines = [JsonLines().format(record) for record in caplog.records]
    assert not any(word in line for line in lines for word in (SECRET, "zebra", image[30:50], "\n"))
    whole, refused = map(json.loads, lines)
    assert whole["id"] == answer["id"] and whole["status"] == 200 and whole["error"] is None
    assert whole["finish_reasons"] == [choice["finish_reason"] for choice in answer["choices"]]
    assert whole["completion_tokens"] == answer["usage"]["completion_tokens"] and whole["images"] == 1
    seconds = whole["seconds"]
    assert list(seconds) == ["read", "prepare", "queue", "first_token", "generate", "total"]
    assert all(value >= 0 for value in seconds.values())
    assert seconds["read"] + seconds["prepare"] + seconds["queue"] + seconds["generate"] <= seconds["total"]
    assert (refused["status"], refused["error"], refused["id"]) == (400, "invalid_value", None)
    text = caplog.records[0].getMessage()
    assert re.fullmatch(r"127\.0\.0\.1 POST /v1/chat/completions 200 \d+\.\d{3}s images=1 .* queued=\d\.\d{3}s", text)


def test_other_lines_are_json_too() -> None:
    record = logging.LogRecord("a", logging.WARNING, "file", 1, "a\n%s", ("b",), None)
    assert json.loads(JsonLines().format(record))["message"] == "a\nb"
