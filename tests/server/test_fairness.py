# SPDX-License-Identifier: Apache-2.0
"""A client with many requests delays others by little, and takes no place from them."""

import asyncio
import contextlib
import json
import select
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from http_running import (
    PATIENCE,
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

from transformers_fastvlm.server.admission import Admission
from transformers_fastvlm.server.api_errors import ApiError
from transformers_fastvlm.server.fair_turns import Turns

TOKENS = 40


def order(places: int, arrivals: list[tuple[str, int]]) -> list[str]:
    """Return the order in which turns are given, where each ends when all before it have."""

    async def scenario() -> list[str]:
        turns = Turns(places)
        waiting = [turns.ask(client, size) for client, size in arrivals]
        running, given = [], []
        while waiting or running:
            new = [turn for turn in waiting if turn.given.done()]
            waiting = [turn for turn in waiting if turn not in new]
            given += [turn.client for turn in new]
            running += new
            running.pop(0).end()
        assert not turns.waiting and not turns._used and not turns._last
        return given

    return asyncio.run(scenario())


@pytest.mark.parametrize(("places", "arrivals"), [(1, "aaab"), (1, "aaaabbc"), (2, "aaaaaabc"), (3, "aaaaabbbc")])
def test_the_client_with_the_fewest_is_next(places: int, arrivals: str) -> None:
    found = order(places, [(client, 1) for client in arrivals])
    assert sorted(found) == sorted(arrivals)
    first = [found.index(client) for client in set(arrivals)]
    assert max(first) <= places + len(first) - 1, found  # whatever the first client asked before


def test_a_large_turn_is_not_overtaken_for_ever() -> None:
    assert order(2, [("a", 1), ("b", 2), ("c", 1), ("c", 1), ("c", 1)])[:2] == ["a", "b"]
    assert order(2, [("a", 5), ("b", 1)]) == ["a", "b"]  # larger than all places


def test_a_turn_that_left_is_passed_over() -> None:
    async def scenario() -> None:
        turns = Turns(1)
        first, second, third = (turns.ask("a") for _ in range(3))
        second.end()
        assert first.given.done() and not third.given.done()
        first.end(), first.end()
        assert third.given.done() and turns._used == {"a": 1}
        third.keep(1)
        assert turns._used == {"a": 1}

    asyncio.run(scenario())


def admission(most: int = 4, max_bytes: int = 100, max_images: int = 4) -> Admission:
    return Admission(most, max_bytes, max_images, lambda: 7)


def test_a_full_server_takes_a_client_with_fewer_requests() -> None:
    async def scenario() -> None:
        one = admission()
        places = [one.admit("a", 1) for _ in range(4)]
        with pytest.raises(ApiError) as error:
            one.admit("a", 1)
        assert error.value.status == 429 and error.value.headers == {"retry-after": "7"}
        places[3].settle()
        one.admit("b", 1)
        assert places[2].refused.result().code == "queue_full" and one.count == 4  # the newest that may go
        one.admit("b", 1)
        assert places[1].refused.done()
        with pytest.raises(ApiError):
            one.admit("b", 1)  # both have two
        places[0].leave()
        one.admit("b", 1)

    asyncio.run(scenario())


def test_bytes_and_images_are_bounded_together() -> None:
    async def scenario() -> None:
        one = admission()
        alone = one.admit("a", 1000)  # more than the bound, but nobody else is there
        with pytest.raises(ApiError) as error:
            one.admit("b", 1)
        assert error.value.code == "memory_full" and one.count == 1
        alone.replace(60)
        second = one.admit("b", 40)
        with pytest.raises(ApiError):
            second.grow(1)
        one.ensure(alone, images=3)
        with pytest.raises(ApiError) as error:
            one.ensure(second, images=2)
        assert error.value.code == "images_full" and "holds 3 images" in error.value.message
        alone.leave()
        one.ensure(second, images=9)
        assert (one.bytes, one.images) == (40, 9)
        second.leave()
        assert one.bytes == one.images == one.count == 0

    asyncio.run(scenario())


def test_bytes_of_a_client_with_more_requests_make_room() -> None:
    async def scenario() -> None:
        one = admission()
        places = [one.admit("a", 30) for _ in range(3)]
        place = one.admit("b", 30)
        assert places[2].refused.done() and not places[1].refused.done()
        one.ensure(place, 10)
        assert one.bytes == 100

    asyncio.run(scenario())


# Over HTTP


@pytest.fixture(scope="module")
def endless() -> tuple[Any, Any]:
    model, processor = load_tiny()
    return never_ending(model), processor


def connect(server: Running, client: int) -> socket.socket:
    """Connect from one of this machine's own addresses."""
    try:
        return socket.create_connection(("127.0.0.1", server.port), PATIENCE, source_address=(f"127.0.0.{client}", 0))
    except OSError:
        pytest.skip("this machine has one address of its own")


def reply(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    received = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in received or not received.endswith(b"}"):
            received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    return int(lines[0].split()[1]), fields, json.loads(body)


@contextlib.contextmanager
def crowd(server: Running, count: int, body: dict[str, Any]) -> Iterator[list[socket.socket]]:
    """A client that asks often at once."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(server, 2)) for _ in range(count)]
        for connection in connections:
            connection.sendall(request_bytes(server.port, body))
        yield connections
    until(lambda: server.service.active == 0)


def test_a_request_among_many_of_another_client_is_answered_early(endless: tuple[Any, Any]) -> None:
    with running(*endless, max_answer_tokens=TOKENS, batch_size=2, queue=30) as server:
        ended: list[int] = []
        with crowd(server, 16, asks()) as connections, ThreadPoolExecutor(17) as pool, connect(server, 3) as other:
            until(lambda: server.service.waiting >= 13)
            other.sendall(request_bytes(server.port, asks(max_tokens=3)))

            def wait(index: int, connection: socket.socket) -> None:
                assert reply(connection)[0] == 200
                ended.append(index)

            for one in [pool.submit(wait, *pair) for pair in enumerate([*connections, other])]:
                one.result(PATIENCE)
        # Those that the model had, and those that the engine had already.
        assert ended.index(16) <= 6, ended


def test_a_client_that_fills_the_queue_keeps_nobody_out(endless: tuple[Any, Any]) -> None:
    with (
        running(*endless, max_answer_tokens=1500, batch_size=1, queue=4) as server,
        crowd(server, 5, asks()) as connections,
        connect(server, 2) as more,
        connect(server, 3) as other,
    ):
        until(lambda: server.service.waiting == 4)
        more.sendall(request_bytes(server.port, asks()))
        status, fields, answer = reply(more)
        assert status == 429 and answer["error"]["code"] == "queue_full" and int(fields["retry-after"]) > 0
        other.sendall(request_bytes(server.port, asks(max_tokens=1)))
        replies = select.select(connections, [], [], PATIENCE)[0]
        status, fields, answer = reply(replies[0])
        assert status == 429 and "gave the place of this request to another client" in answer["error"]["message"]
        assert len(replies) == 1 and int(fields["retry-after"]) > 0
        assert server.service.admission.count == 5
        for connection in connections:
            connection.close()
        assert reply(other)[0] == 200


def test_images_of_all_requests_are_bounded(endless: tuple[Any, Any]) -> None:
    shown = shows(data_url(Image.new("RGB", (32, 32))), "What is it?")
    with running(*endless, max_answer_tokens=1500, batch_size=1, queue=9, max_held_images=3) as server:
        with crowd(server, 3, {"model": "tiny", "messages": [shown]}):
            until(lambda: server.service.admission.images == 3 and server.service.waiting == 2)
            status, answer, fields = server.post({"model": "tiny", "messages": [shown, shown, shown]})
            assert status == 429 and answer["error"]["code"] == "images_full" and int(fields["retry-after"]) > 0
            assert server.service.admission.count == 3
        assert server.post({"model": "tiny", "messages": [shown] * 4, "max_tokens": 1})[0] == 200  # alone
        until(lambda: server.service.active == 0)


def test_bytes_of_all_requests_are_bounded(endless: tuple[Any, Any]) -> None:
    shown = {"model": "tiny", "messages": [shows(data_url(Image.new("RGB", (32, 32))), "What is it?")]}
    with running(*endless, max_answer_tokens=1500, batch_size=1, queue=9, max_held_bytes=200_000) as server:
        with crowd(server, 1, shown):
            until(lambda: server.service.admission.bytes > 200_000)  # what was made of the image
            status, answer, fields = server.post(asks())
            assert status == 429 and answer["error"]["code"] == "memory_full" and int(fields["retry-after"]) > 0
        assert server.post(asks(max_tokens=1))[0] == 200
