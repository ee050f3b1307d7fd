# SPDX-License-Identifier: Apache-2.0
"""`fastvlm serve` with many clients, with clients that leave or stop reading, and with more than it takes."""

import json
import logging
import os
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("openai", reason="openai is not installed")

import openai
from http_running import (
    Process,
    Running,
    asks,
    data_url,
    load_tiny,
    never_ending,
    request_bytes,
    running,
    shows,
    until,
)

from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.engines import Request as EngineRequest

LONG = 1500


@pytest.fixture(scope="module")
def endless() -> tuple[Any, Any]:
    model, processor = load_tiny()
    return never_ending(model), processor


@pytest.fixture
def slow(endless: tuple[Any, Any]) -> Iterator[Running]:
    """A server that answers one request at a time, each of them for a long time, and keeps two more."""
    with running(*endless, max_answer_tokens=LONG, batch_size=1, queue=2) as one:
        yield one


def is_idle(server: Running) -> bool:
    return server.service.active == 0


def rows(server: Running) -> int:
    """Return how many requests wait for the model."""
    return int(server.service.waiting)


def test_a_client_that_leaves_frees_its_work(slow: Running) -> None:
    for stream in (True, False):
        connections = [slow.connect() for _ in range(3)]
        for connection in connections:
            connection.sendall(request_bytes(slow.port, asks(stream=stream)))
        until(lambda: slow.service.active == 3 and rows(slow) == 2)
        for connection in connections:
            connection.close()
        until(lambda: is_idle(slow))
        assert rows(slow) == 0
        # The engine is free at once, not after thousands of tokens: what it answers next is complete and short.
        status, answer, _ = slow.post(asks(max_tokens=2))
        assert status == 200 and answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row_within_a_token(slow: Running, stream: bool) -> None:
    connection = slow.connect()
    connection.sendall(request_bytes(slow.port, asks(stream=stream)))
    until(lambda: any(row.tokens > 3 for row in slow.service._rows))
    (row,) = slow.service._rows
    seen: list[int] = []
    cancel = row.cancel
    row.cancel = lambda: (seen.append(row.tokens), cancel())[1]
    waiting = slow.connect()
    waiting.sendall(request_bytes(slow.port, asks(stream=stream)))
    until(lambda: slow.service.waiting == 1)
    connection.close()
    until(lambda: row.done)
    assert len(seen) == 1 and row.tokens - seen[0] <= 1 and row.tokens < LONG
    until(lambda: slow.service.waiting == 0)  # the place is the next one's
    waiting.close()
    until(lambda: is_idle(slow))


def test_a_full_queue_refuses(slow: Running) -> None:
    connections = [slow.connect() for _ in range(3)]
    for connection in connections:
        connection.sendall(request_bytes(slow.port, asks(stream=True)))
    until(lambda: slow.service.active == 3)
    status, answer, headers = slow.post(asks())
    assert status == 429 and answer["error"]["code"] == "queue_full" and answer["error"]["type"] == "rate_limit_error"
    assert 1 <= int(headers["retry-after"]) <= 60
    assert slow.get("/health")[0] == 200 and slow.get("/v1/models")[0] == 200  # also while it answers
    with slow.client() as client, pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**asks())
    for connection in connections:
        connection.close()
    until(lambda: is_idle(slow))
    assert slow.post(asks(max_tokens=2))[0] == 200


def test_clients_that_stop_reading_do_not_block_others(endless: tuple[Any, Any]) -> None:
    options = {"max_answer_tokens": 400, "batch_size": 16, "queue": 0, "client_timeout": 5.0}
    with running(*endless, send_buffer=4096, **options) as server:
        given_up: list[Any] = []
        abort = server.service.abort
        server.service.abort = lambda scope: (given_up.append(scope), abort(scope))[1]
        connections = []
        for _ in range(3):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            # A busy server joins the texts of several tokens, but not their logprobs: twenty kilobytes a token.
            asked = asks(stream=True, n=16, logprobs=True, top_logprobs=20)
            connection.sendall(request_bytes(server.port, asked))
            connections.append(connection)
        status, answer, _ = server.post(asks(max_tokens=3))
        assert status == 200 and answer["usage"]["completion_tokens"] == 3
        until(lambda: len(given_up) == 3 and is_idle(server))
        for connection in connections:
            connection.close()


def test_a_stalled_response_is_given_up() -> None:
    """Without the buffers of a real connection: the client takes nothing at all."""
    import asyncio

    from transformers_fastvlm.server.connections import Gone, sender

    async def never(message: Any) -> None:
        await asyncio.Event().wait()

    async def scenario() -> list[str]:
        calls: list[str] = []
        with pytest.raises(Gone):
            await sender(never, 0.05, lambda: calls.append("closed"))({"type": "http.response.body"})
        return calls

    assert asyncio.run(scenario()) == ["closed"]


def load(server: Running, clients: int, requests: int) -> list[list[str]]:
    """Ask from many clients at once; return what each question was answered, refusals tried again."""
    pairs = [
        (row["images"][0], row["messages"][0]["content"].removeprefix("<image>\n")) for row in SceneDataset(5, seed=3)
    ]
    bodies = [{"model": "tiny", "messages": [shows(data_url(image), text)], "max_tokens": 24} for image, text in pairs]

    def run(client: int) -> list[tuple[int, str]]:
        found = []
        for index in range(requests):
            question = (client + index) % len(bodies)
            if index % 2:
                found.append((question, stream(server, bodies[question])))
                continue
            while (reply := server.post(bodies[question]))[0] == 429:
                pass
            assert reply[0] == 200, reply
            found.append((question, reply[1]["choices"][0]["message"]["content"]))
        return found

    with ThreadPoolExecutor(clients) as pool:
        answers = [one for found in pool.map(run, range(clients)) for one in found]
    assert len(answers) == clients * requests
    return [sorted({text for question, text in answers if question == index}) for index in range(len(bodies))]


def stream(server: Running, body: dict[str, Any]) -> str:
    with server.client(max_retries=100) as client:
        chunks = client.chat.completions.create(**body, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_many_clients_get_the_answers_of_single_ones() -> None:
    with running(*load_tiny(), batch_size=4) as server:
        alone = load(server, 1, 5)
        assert load(server, 4, 5) == alone
        assert [len(texts) for texts in alone] == [1] * 5
        until(lambda: is_idle(server))


@pytest.mark.soak
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not tell a process's memory so")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_flat_under_load(dtype: str) -> None:
    """The first half also fills what PyTorch keeps for each new shape of a batch, which has an end."""
    process = Process("-m", "tiny", "--dtype", dtype)
    try:
        server = process.wait_until_ready()
        alone = load(server, 1, 5)
        first = load(server, 16, 20)
        half = memory(process)
        second = load(server, 16, 20)
        assert memory(process) < half * 1.03
        # In bfloat16 sums in another order can make two tokens of nearly the same score change places.
        assert dtype == "bfloat16" or first == second == alone
    finally:
        process.close()


def memory(process: Process | None = None) -> int:
    """Return the bytes that a server holds, or this process."""
    with open(f"/proc/{'self' if process is None else process.process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


FAILS = 666
"""Seed of the requests that fail while they are answered."""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not tell a process's memory so")
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.soak)])
def test_requests_that_leave_or_fail_cost_others_nothing(
    count: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of many requests 10 % leave early, 5 % are malformed and 2 % fail; the others are answered as they are alone."""
    take = EngineRequest.take

    def take_or_fail(request: Any, token: int) -> bool:
        if request.sampling.seed == FAILS:
            raise RuntimeError("on purpose")
        return take(request, token)

    monkeypatch.setattr(EngineRequest, "take", take_or_fail)
    # Records of the log keep the traceback of a failure, and with it the tensors of its batch.
    caplog.set_level(logging.CRITICAL, "transformers_fastvlm.engines")
    rows = SceneDataset(5, seed=3)
    pairs = [(row["images"][0], row["messages"][0]["content"].removeprefix("<image>\n")) for row in rows]
    bodies = [{"model": "tiny", "messages": [shows(data_url(image), text)], "max_tokens": 24} for image, text in pairs]
    bodies += [body | {"temperature": 1.5, "seed": 7, "n": 2} for body in bodies[:2]] + [asks(max_tokens=16)]
    draw = random.Random(2026)
    kinds = draw.choices(("leaves", "malformed", "fails", "whole"), (10, 5, 2, 83), k=count)
    kinds[:3] = ("leaves", "malformed", "fails")  # each of them in a short run too
    loaded = load_tiny()  # its progress bar leaves a thread of tqdm's
    before, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    with running(*loaded, batch_size=4, queue=20) as server:
        alone = [answers_of(server.post(body)) for body in bodies]

        def run(index: int) -> tuple[str, int, Any]:
            body = bodies[index % len(bodies)]
            if kinds[index] == "leaves":
                with server.connect() as connection:
                    connection.sendall(request_bytes(server.port, body | {"stream": bool(index % 3)}))
                    if index % 2:
                        connection.recv(10)
                return "leaves", 499, None
            if kinds[index] == "malformed":
                broken = (b'{"model": ', json.dumps(asks(seed="a")).encode(), json.dumps(body).encode()[:-40])
                return "malformed", server.post(broken[index % 3])[0], None
            while (reply := server.post(body | ({"seed": FAILS} if kinds[index] == "fails" else {})))[0] == 429:
                pass
            return kinds[index], reply[0], answers_of(reply)

        def check(indices: range) -> None:
            with ThreadPoolExecutor(8) as pool:
                for index, (kind, status, texts) in zip(indices, pool.map(run, indices), strict=True):
                    assert status == {"leaves": 499, "malformed": 400, "fails": 500, "whole": 200}[kind], (kind, status)
                    assert kind != "whole" or texts == alone[index % len(bodies)]

        check(range(count // 2))
        half = memory()
        check(range(count // 2, count))
        # `make soak` lets oneDNN keep few shapes; its cache of 1,024 fills for thousands of requests.
        assert count < 1000 or memory() < half * 1.03
        until(lambda: is_idle(server))
        assert server.service.waiting == server.service.admission.count == server.service.admission.bytes == 0
        assert not server.service._rows and not server.service.turns._used
    until(lambda: set(threading.enumerate()) <= before)
    assert len(os.listdir("/proc/self/fd")) <= files


def answers_of(reply: tuple[int, dict[str, Any], Any]) -> list[str]:
    return [choice["message"]["content"] for choice in reply[1].get("choices", [])]


def test_requests_in_one_connection(slow: Running) -> None:
    with slow.connect() as connection:
        for _ in range(3):
            connection.sendall(request_bytes(slow.port, asks(max_tokens=1)))
            received = b""
            while b"\r\n\r\n" not in received or not received.endswith(b"}"):
                received += connection.recv(65536)
            assert received.startswith(b"HTTP/1.1 200 ") and json.loads(received.partition(b"\r\n\r\n")[2])["usage"]
