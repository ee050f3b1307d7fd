# SPDX-License-Identifier: Apache-2.0
"""What `fastvlm serve` refuses, and that it goes on answering after it."""

import base64
import contextlib
import gzip
import io
import json
import select
import struct
import urllib.request
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from http_running import PATIENCE, Running, asks, data_url, head, load_tiny, running, shows

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def model_and_processor() -> tuple[Any, Any]:
    return load_tiny()


@pytest.fixture(scope="module")
def server(model_and_processor: tuple[Any, Any]) -> Iterator[Running]:
    options = {"max_body_bytes": 2 * MEBIBYTE, "max_images": 2, "max_pixels": 500_000, "max_answer_tokens": 50}
    hosts = ("localhost", "127.0.0.1", "169.254.169.254", "10.0.0.1", "[::1]", "::1")
    with running(*model_and_processor, **options, image_hosts=hosts, batch_size=2) as one:
        yield one


@pytest.fixture(autouse=True)
def _goes_on(server: Running) -> Iterator[None]:
    yield
    status, body, _ = server.post(asks(max_tokens=2))
    assert status == 200 and body["choices"][0]["message"]["role"] == "assistant"


def bomb(width: int, height: int) -> str:
    """Return a PNG of few bytes that says it has many pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(MEBIBYTE), 9)
    png = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return "data:image/png;base64," + base64.b64encode(png + part(b"IDAT", rows) + part(b"IEND", b"")).decode()


def image(side: int = 64) -> str:
    return data_url(Image.new("RGB", (side, side), "red"))


def truncated() -> str:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()[:800]).decode()


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}


def messages(content: Any, role: str = "user") -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"what is this?", "is not JSON"),
        (b"", "is not JSON"),
        (b'{"model": "tiny", "temperature": NaN}', "NaN is not a number in JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 10_000, "nested too deeply"),
        (b"[1]", "expected an object"),
        (b'{"model": "tiny"}', "messages is missing"),
        (b'{"model": "tiny", "messages": []}', "messages is missing"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "model is missing"),
    ],
)
def test_a_body_that_is_no_request(server: Running, body: bytes, part: str) -> None:
    status, answer, _ = server.post(body)
    assert status == 400 and part in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("data:image/png;base64,@@@@", "base64 of the image is broken"),
        ("data:image/png;base64,iVBORw0KGgoAA", "it has 13 characters, an impossible length for base64"),
        ("data:image/png;base64,iVB=Rw0KGgoA", "base64 of the image is broken"),
        ("data:image/png;base64,iVB%2", "base64 of the image is broken"),
        ("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", "base64 of the image is broken"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,aGVsbG8gd29ybGQ=", "not an image of a supported format"),
        ("data:image/png,hello", "expected data:image/...;base64"),
        (bomb(60_000, 60_000), "too many pixels"),
        (bomb(1000, 1000), "too many pixels; this server accepts 500000"),
        (bomb(600, 800), "truncated or damaged"),
        (truncated(), "truncated or damaged"),
        ("file:///etc/passwd", "Files are never read"),
        ("/etc/passwd", "Files are never read"),
        ("ftp://example.com/a.png", "Files are never read"),
        ("https://example.com/a.png", "not downloaded from 'example.com', port 443"),
        ("http://localhost/a.png", "not public"),
        ("http://127.0.0.1/a.png", "not public"),
        ("http://169.254.169.254/latest/meta-data", "not public"),
        ("http://10.0.0.1/a.png", "not public"),
        ("http://[::1]/a.png", "not public"),
        ("http://localhost:22/a.png", "not downloaded from 'localhost', port 22"),
        ("http://user:secret@localhost/a.png", "contains a user name"),
        ("http://localhost/a b.png", "printable ASCII"),
        ("http://localhost:port/a.png", "not valid"),
    ],
)
def test_an_image_that_is_not_taken(server: Running, url: str, part: str) -> None:
    status, answer, _ = server.post({"model": "tiny", "messages": [shows(url, "What is it?")]})
    assert status == 400, answer
    assert part in answer["error"]["message"], answer
    assert "secret" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("status", "body", "part"),
    [
        (404, asks() | {"model": "gpt-4o"}, "is not served here"),
        (400, asks(max_tokens=51), "1 to 50"),
        (400, asks(max_tokens=0), "1 to 50"),
        (400, asks(max_tokens=2, max_completion_tokens=3), "differ"),
        (400, asks("word " * 3000), "up to 2048 tokens"),
        (400, asks("word " * 300_000), "bytes of text"),
        (400, messages([shows(image(), "a")["content"][0]] * 3), "this server accepts 2"),
        (400, messages([shows(image(600), "a")["content"][0]] * 2), "this server accepts 500000"),
        (400, asks(n=3), "1 to 2"),
        (400, asks(temperature=3), "from 0 to 2"),
        (400, asks(temperature=True), "from 0 to 2"),
        (400, asks(top_p=0), "above 0"),
        (400, asks(seed=2**64), "seed is"),
        (400, asks(stop=[""]), "1 to 256 characters"),
        (400, asks(stop=["a"] * 5), "up to 4"),
        (400, asks(stream="yes"), "true or false"),
        (400, asks(stream_options={"include_usage": True}), "stream: true"),
        (400, asks(top_logprobs=3), "top_logprobs needs logprobs: true"),
        (400, asks(logprobs=True, top_logprobs=21), "top_logprobs is 21; expected 0 to 20"),
        (400, asks(logit_bias={"1e3": 1}), "ids of tokens"),
        (400, asks(logit_bias={"50": 101}), "logit_bias.50 is 101; expected a number from -100 to 100"),
        (400, asks(logit_bias={"99999999": 1}), "logit_bias has token 99999999"),
        (400, asks(logit_bias={str(token): 1 for token in range(1025)}), "logit_bias has 1025 tokens"),
        (400, asks(tools=[{"type": "function"}]), "tools is not supported"),
        (400, asks(response_format={"type": "xml"}), "text, json_object or json_schema"),
        (400, asks(response_format={"type": "json_schema"}), "response_format.json_schema is missing"),
        (400, asks(response_format=schema(None)), "json_schema.schema is missing"),
        (400, asks(response_format=schema({"type": "color"})), "is not supported"),
        (400, asks(response_format=schema({"type": "object", "uniqueItems": 3, "not": {}})), "is not supported"),
        (400, asks(response_format={"type": "json_object"}, stop="a"), "leave stop out"),
        (400, asks(chat_template="{{ 1 }}"), "chat_template is not supported"),
        (400, asks(generation_config={"max_length": 1}), "generation_config is not supported"),
        (400, asks(frequency_penalty=2.5), "frequency_penalty is 2.5; expected a number from -2 to 2"),
        (400, messages("a", "tool"), "system, developer, user or assistant"),
        (400, messages("a", "system"), "last message has role system"),
        (400, messages([shows(image(), "a")["content"][0]], "system"), "put images into user messages"),
        (400, messages([{"type": "video", "video": "a.mp4"}]), "text or image_url"),
        (400, messages([{"type": "image", "path": "/etc/passwd"}]), "text or image_url"),
        (
            400,
            messages([{"type": "image_url", "image_url": "data:,"}]),
            'is \'data:,\'; expected an object {"url": "data:',
        ),
        (400, messages([{"type": "text", "text": "a\ud800"}]), "valid Unicode"),
        (400, messages([]), "a list of parts"),
        (400, messages(None), "content is missing"),
        (400, messages([{"type": "text"}]), "text is missing"),
    ],
)
def test_a_request_that_is_not_taken(server: Running, status: int, body: dict[str, Any], part: str) -> None:
    given, answer, _ = server.post(body)
    assert given == status, answer
    assert part in answer["error"]["message"], answer


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"model": "tiny", "messages": [' + b"[]," * 600_000 + b"[]]}", id="lists"),
        pytest.param(b'{"model": "tiny", "messages": [' + b"{}," * 600_000 + b"{}]}", id="objects"),
        pytest.param(b'{"model": "tiny", "metadata": [' + b"1," * 1_000_000 + b"1]}", id="numbers"),
        pytest.param(json.dumps(messages([{"type": "text", "text": ""}] * 40_000)).encode(), id="parts"),
    ],
)
def test_a_body_of_many_values_is_refused_before_it_is_parsed(server: Running, body: bytes) -> None:
    status, answer, _ = server.post(body)
    assert status == 413 and answer["error"]["code"] == "request_too_large"
    assert "this server accepts 20000" in answer["error"]["message"]


def test_fields_that_change_nothing_are_taken(server: Running) -> None:
    harmless = {"user": "me", "metadata": {}, "frequency_penalty": 0, "logprobs": False, "tools": None, "n": 1}
    status, answer, _ = server.post(asks(**harmless, response_format={"type": "text"}, max_tokens=2))
    assert status == 200, answer


def test_another_content_type_is_refused(server: Running) -> None:
    # What a page of another origin could send without asking the browser.
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(asks()).encode(), {"Content-Type": "text/plain"}
    )
    status, answer, _ = server.send(request)
    assert status == 415 and "expected application/json" in answer["error"]["message"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
def test_a_compressed_body_is_refused_by_name(server: Running, encoding: str) -> None:
    body = gzip.compress(json.dumps(asks()).encode())
    status, answer, _ = server.post(body, Content_Encoding=encoding)
    assert status == 415 and repr(encoding) in answer["error"]["message"]
    assert server.post(asks(max_tokens=1), Content_Encoding="identity")[0] == 200


def test_a_mark_of_the_order_of_bytes_is_passed_over(server: Running) -> None:
    assert server.post(b"\xef\xbb\xbf" + json.dumps(asks(max_tokens=1)).encode())[0] == 200


@pytest.mark.parametrize("length", ["Content-Length: 200000000", "Transfer-Encoding: chunked"])
def test_a_large_body_is_refused_before_its_end(server: Running, length: str) -> None:
    piece = b"x" * MEBIBYTE
    framed = piece if "Length" in length else b"100000\r\n" + piece + b"\r\n"
    with server.connect() as connection:
        connection.sendall(head(server.port, length))
        sent = 0
        with contextlib.suppress(ConnectionError):
            connection.settimeout(PATIENCE)
            # A client that reads while it writes sees the answer after a few of the 200 pieces.
            while sent < 200 and not select.select([connection], [], [], 0)[0]:
                connection.sendall(framed)
                sent += 1
        assert sent < 200
        answer = connection.recv(65536)
        while not answer.endswith(b"}") and (more := connection.recv(65536)):  # head and body may come apart
            answer += more
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"request_too_large" in answer and b"connection: close" in answer


def test_a_large_body_that_is_announced_is_not_asked_for(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(head(server.port, "Content-Length: 200000000\r\nExpect: 100-continue"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_writes_all_before_it_reads_sees_413(server: Running) -> None:
    status, answer, _ = server.post(b" " * (8 * MEBIBYTE))
    assert status == 413 and answer["error"]["code"] == "request_too_large"


def test_a_body_that_never_ends_is_given_up(model_and_processor: tuple[Any, Any]) -> None:
    with running(*model_and_processor, client_timeout=0.5) as server, server.connect() as connection:
        connection.sendall(head(server.port, "Content-Length: 1000") + b'{"model"')
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_a_key(model_and_processor: tuple[Any, Any]) -> None:
    with running(*model_and_processor, api_key=" secret\n") as server:  # as files with secrets end
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, answer, fields = server.post(asks(max_tokens=2), **headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key", answer
            assert fields["www-authenticate"] == "Bearer"
        assert server.get("/v1/models")[0] == 401
        assert server.get("/health")[0] == 200
        assert server.post(asks(max_tokens=2), Authorization="Bearer secret")[0] == 200
