# SPDX-License-Identifier: Apache-2.0
"""Images take their own time and nobody else's: not that of texts, and none once their client has left."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from http_running import asks, data_url, load_tiny, request_bytes, running, shows, until

from transformers_fastvlm.server import preparation

SOON = 20.0
"""Seconds within which something comes that takes a second or less on an idle machine."""


@pytest.fixture(scope="module")
def model_and_processor() -> tuple[Any, Any]:
    return load_tiny()


def with_images(count: int = 1) -> dict[str, Any]:
    url = data_url(Image.new("RGB", (32, 32), "red"))
    return {"model": "tiny", "messages": [shows(url, "What is it?")] * count, "max_tokens": 1}


class Held:
    """Holds threads up before they decode images, until the end of the block."""

    def __init__(self) -> None:
        self.entered: list[int] = []
        self.ends: list[BaseException | None] = []
        self.gate = threading.Event()

    def decode(self, image_urls: Any, *arguments: Any) -> Any:
        if not image_urls:
            return decode(image_urls, *arguments)
        self.entered.append(1)
        assert self.gate.wait(SOON * 10)
        try:
            found = decode(image_urls, *arguments)
        except BaseException as error:
            self.ends.append(error)
            raise
        self.ends.append(None)
        return found


decode = preparation.decode


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    one = Held()
    monkeypatch.setattr(preparation, "decode", one.decode)
    yield one
    one.gate.set()


def test_texts_do_not_wait_for_images(model_and_processor: tuple[Any, Any], held: Held) -> None:
    with running(*model_and_processor) as server, ThreadPoolExecutor(5) as pool:
        images = [pool.submit(server.post, with_images()) for _ in range(4)]
        try:
            until(lambda: len(held.entered) == 2)
            assert pool.submit(server.post, asks(max_tokens=1)).result(SOON)[0] == 200
        finally:
            held.gate.set()
        assert [one.result()[0] for one in images] == [200] * 4


def test_images_whose_client_has_left_are_not_decoded(model_and_processor: tuple[Any, Any], held: Held) -> None:
    with running(*model_and_processor) as server, contextlib.ExitStack() as stack:
        stack.callback(held.gate.set)
        clients = [server.connect() for _ in range(4)]
        for client in clients:
            client.sendall(request_bytes(server.port, with_images()))
        until(lambda: len(held.entered) == 2 and server.service.active == 4)
        for client in clients:
            client.close()
        until(lambda: server.service.active == 0)  # while two threads still hold an image
        held.gate.set()
        until(lambda: len(held.ends) == 2)
        assert server.post(with_images())[0] == 200
    assert [type(error).__name__ for error in held.ends] == ["Gone", "Gone", "NoneType"]
    assert len(held.entered) == 3  # the two that waited never began


def test_images_have_so_much_time(model_and_processor: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with running(*model_and_processor) as server:
        monkeypatch.setattr(preparation, "_SECONDS", -1.0)
        status, answer, _ = server.post(with_images(2))
        assert status == 400 and answer["error"]["code"] == "image_too_slow"
        assert "Send fewer or smaller images" in answer["error"]["message"]
        monkeypatch.undo()
        assert server.post(with_images(2))[0] == 200


def test_a_decoder_that_does_not_end_is_not_waited_for(
    model_and_processor: tuple[Any, Any], held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own request and those behind it are answered, their places are free, and texts go on."""
    monkeypatch.setattr(preparation, "_SECONDS", 0.5)
    monkeypatch.setattr(preparation, "_WAIT_SECONDS", 1.0)
    with running(*model_and_processor) as server, ThreadPoolExecutor(4) as pool:
        both = [one.result(SOON) for one in [pool.submit(server.post, with_images()) for _ in range(2)]]
        assert [(status, body["error"]["code"]) for status, body, _ in both] == [(400, "image_too_slow")] * 2
        assert len(held.entered) == 2
        status, body, headers = pool.submit(server.post, with_images()).result(SOON)
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "images_busy", "30")
        until(lambda: server.service.active == 0)  # the answer reaches the client a moment earlier
        assert pool.submit(server.post, asks(max_tokens=1)).result(SOON)[0] == 200
        held.gate.set()
        until(lambda: len(held.ends) == 2)
        monkeypatch.undo()
        assert server.post(with_images())[0] == 200


def test_the_end_does_not_wait_for_a_decoder(
    model_and_processor: tuple[Any, Any], held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "_END_SECONDS", 0.1)
    before = set(threading.enumerate())
    with running(*model_and_processor) as server, server.connect() as client:
        client.sendall(request_bytes(server.port, with_images()))
        until(lambda: len(held.entered) == 1)
    left = set(threading.enumerate()) - before  # the server has ended, while this one holds its image
    assert [one.name.rpartition("_")[0] for one in left] == ["images"] and all(one.daemon for one in left)
    held.gate.set()
    until(lambda: not set(threading.enumerate()) - before)


def test_no_thread_is_left(model_and_processor: tuple[Any, Any]) -> None:
    before = set(threading.enumerate())
    with running(*model_and_processor) as server:
        assert server.post(with_images())[0] == server.post(asks(max_tokens=1))[0] == 200
    assert set(threading.enumerate()) <= before
