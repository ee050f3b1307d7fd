# SPDX-License-Identifier: Apache-2.0
"""Clients that send nothing, half of something, or all of it slowly cost others nothing."""

import contextlib
import resource
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from http_running import Running, asks, head, load_tiny, never_ending, request_bytes, running, until

from transformers_fastvlm.server import connections, server, transport

SOON = 20.0
"""Seconds within which something comes that takes a second or less on an idle machine."""


@pytest.fixture(scope="module")
def model_and_processor() -> tuple[Any, Any]:
    return load_tiny()


@pytest.fixture(scope="module")
def hasty(model_and_processor: tuple[Any, Any]) -> Iterator[Running]:
    """A server that gives a client half a second."""
    with running(*model_and_processor, client_timeout=0.5) as one:
        yield one


def received(connection: socket.socket, seconds: float = SOON) -> bytes:
    """Return what comes until the server closes the connection."""
    connection.settimeout(seconds)
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            found += piece
    return found


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTTP/1.1\r\nHost:", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /he"]
)
def test_a_connection_without_a_whole_head_is_closed(hasty: Running, sent: bytes) -> None:
    with hasty.connect() as connection:
        connection.sendall(sent)
        answers = received(connection)
    assert answers.count(b"HTTP/1.1 200 ") == sent.count(b"\r\n\r\n")


def test_a_head_that_trickles_is_given_up(hasty: Running) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        end = time.monotonic() + SOON
        while not select.select([connection], [], [], 0.1)[0]:
            assert time.monotonic() < end
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"X-Line: 1\r\n")
        assert received(connection) == b""


def test_a_client_that_never_reads_is_given_up(model_and_processor: tuple[Any, Any]) -> None:
    with running(*model_and_processor, client_timeout=0.5, send_buffer=4096) as one, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(SOON)
        connection.connect(("127.0.0.1", one.port))
        many = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n" * 500_000
        with pytest.raises(ConnectionError):  # the buffers of both sides are full long before all is sent
            connection.sendall(many)


def test_one_connection_too_many_ends_the_oldest_that_is_idle(
    model_and_processor: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_CONNECTIONS", 10)
    with running(*model_and_processor, batch_size=1, queue=0) as one, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(one.connect()) for _ in range(30)]
        assert one.get("/health")[0] == 200
        until(lambda: len(select.select(idle, [], [], 0)[0]) >= 21)
        ended = select.select(idle, [], [], 0)[0]
        assert ended == idle[: len(ended)] and len(ended) <= 22


def test_a_full_table_of_files_is_said_once_and_recovers(
    model_and_processor: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with running(*model_and_processor) as one, contextlib.ExitStack() as stack:
        held = [stack.enter_context(one.connect()) for _ in range(4)]
        until(lambda: one.get("/health")[0] == 200)
        waiting = [stack.enter_context(socket.socket()) for _ in range(12)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(one.fileno() for one in waiting) + 1, hard))
        try:
            for connection in waiting:
                connection.connect(("127.0.0.1", one.port))
            until(lambda: bool(select.select(held, [], [], 0)[0]))  # those that waited longest make room
            time.sleep(1.5)  # asyncio tries again each second
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert one.get("/health")[0] == 200
    said = [record.getMessage() for record in caplog.records if "accept" in record.getMessage()]
    assert said == ["no further connection can be accepted: Too many open files (ulimit -n)"]


def test_slow_bodies_keep_nobody_out(model_and_processor: tuple[Any, Any]) -> None:
    with running(*model_and_processor, batch_size=1, queue=1) as one, contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(one.connect())
            connection.sendall(head(one.port, "Content-Length: 1000") + b"{")
        until(lambda: len(one.service.bodies._all) == 2)
        assert one.service.active == 0
        assert one.post(asks(max_tokens=1))[0] == 200
        # Clients send the head and a short body one after the other.
        whole = request_bytes(one.port, asks(max_tokens=1))
        at, parted = whole.index(b"\r\n\r\n") + 4, stack.enter_context(one.connect())
        parted.sendall(whole[:at])
        time.sleep(0.2)
        parted.sendall(whole[at:])
        parted.settimeout(SOON)
        assert parted.recv(65536).startswith(b"HTTP/1.1 200 ")
        # A further body that takes longer has to wait for a place.
        late = stack.enter_context(one.connect())
        late.sendall(head(one.port, "Content-Length: 1000") + b"{")
        assert late.recv(65536).startswith(b"HTTP/1.1 429 ")


def test_the_slowest_body_makes_room(model_and_processor: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_WINDOW_SECONDS", 0.05)
    monkeypatch.setattr(connections, "_LEAST_RATE", 0)
    with running(*model_and_processor, batch_size=1, queue=1) as one, contextlib.ExitStack() as stack:
        slow, faster, late = (stack.enter_context(one.connect()) for _ in range(3))
        slow.sendall(head(one.port, "Content-Length: 1000") + b"{")
        until(lambda: len(one.service.bodies._all) == 1)
        faster.sendall(head(one.port, "Content-Length: 1000") + b"{" * 900)
        until(lambda: len(one.service.bodies._all) == 2)
        time.sleep(0.2)
        whole = request_bytes(one.port, asks(max_tokens=1))
        late.sendall(whole[:-5])
        slow.settimeout(SOON)
        assert slow.recv(65536).startswith(b"HTTP/1.1 408 ")
        late.sendall(whole[-5:])
        late.settimeout(SOON)
        assert late.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert not select.select([faster], [], [], 0)[0]


def test_bodies_hold_so_many_bytes_together(
    model_and_processor: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers_fastvlm.server.application._BODIES_HELD", 1)
    with running(*model_and_processor, max_body_bytes=1000) as one, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(one.connect()) for _ in range(2))
        first.sendall(head(one.port, "Content-Length: 1000") + b"{" * 600)
        until(lambda: sum(body.size for body in one.service.bodies._all) == 600)
        second.sendall(head(one.port, "Content-Length: 1000") + b"{" * 600)
        second.settimeout(SOON)
        assert second.recv(65536).startswith(b"HTTP/1.1 429 ")
        until(lambda: len(one.service.bodies._all) == 1)


def test_a_body_below_the_least_rate_is_given_up(
    model_and_processor: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_WINDOW_SECONDS", 0.5)
    with running(*model_and_processor) as one, one.connect() as connection:
        connection.sendall(head(one.port, "Content-Length: 100000") + b"{" * 5000)
        end = time.monotonic() + SOON
        while not select.select([connection], [], [], 0.1)[0]:
            assert time.monotonic() < end
            connection.sendall(b"{")
        answer = received(connection)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"more slowly than 1000 bytes per second" in answer


@pytest.mark.parametrize(
    "lines",
    [
        ["GET /health HTTP/1.1", "Content-Length: 4", "Transfer-Encoding: chunked"],
        ["POST /v1/chat/completions HTTP/1.1", "Content-Length: 4", "Transfer-Encoding: chunked"],
        ["POST /v1/chat/completions HTTP/1.0", "Transfer-Encoding: chunked"],
    ],
)
def test_a_request_with_two_ends_is_refused_and_its_connection_closed(hasty: Running, lines: list[str]) -> None:
    smuggled = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    with hasty.connect() as connection:
        fields = [lines[0], "Host: a", "Content-Type: application/json", *lines[1:], "", "0", "", ""]
        connection.sendall("\r\n".join(fields).encode() + smuggled)
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
    assert b"Transfer-Encoding" in answer and b"connection: close" in answer.lower()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_says_that_it_sends_no_more_is_answered(
    model_and_processor: tuple[Any, Any], stream: bool
) -> None:
    with running(*model_and_processor) as one, one.connect() as connection:
        connection.sendall(request_bytes(one.port, asks(max_tokens=20, stream=stream)))
        connection.shutdown(socket.SHUT_WR)
        answer = received(connection)
    assert b"HTTP/1.1 200 " in answer
    assert answer.rstrip().endswith(b"0" if stream else b"}")
    assert not stream or b"data: [DONE]" in answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_client_that_leaves_while_it_waits_is_noticed(half: bool, stream: bool) -> None:
    model, processor = load_tiny()
    with running(never_ending(model), processor, max_answer_tokens=1500, batch_size=1) as one:
        first, second = one.connect(), one.connect()
        for connection in (first, second):  # one is answered, one waits; neither needs a token to be noticed
            connection.sendall(request_bytes(one.port, asks(stream=stream)))
        until(lambda: one.service.active == 2 and one.service.waiting == 1)
        if half:
            second.shutdown(socket.SHUT_WR)
            time.sleep(0.3)
        second.close()
        until(lambda: (one.service.active, one.service.waiting) == (1, 0))
        first.close()
        until(lambda: one.service.active == 0)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("TRACE /health HTTP/1.1", 405),
        ("TRACE /v1/chat/completions HTTP/1.1", 405),
        ("DELETE /v1/models HTTP/1.1", 405),
        ("TRACE /nothing HTTP/1.1", 404),
        ("CONNECT example.com:443 HTTP/1.1", 404),
        ("OPTIONS * HTTP/1.1", 404),
    ],
)
def test_methods_that_are_not_there(hasty: Running, line: str, status: int) -> None:
    with hasty.connect() as connection:
        connection.sendall(f"{line}\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        answer = received(connection)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
    assert b"invalid_request_error" in answer or b"not_found_error" in answer
    assert status == 404 or b"allow: " in answer.lower()


def test_other_errors_of_the_loop_are_logged_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    import asyncio

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        transport.on_loop_error(set())(loop, {"message": "something else", "exception": OSError(24, "many")})

    asyncio.run(scenario())
    assert "something else" in caplog.text
