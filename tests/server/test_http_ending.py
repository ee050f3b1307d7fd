# SPDX-License-Identifier: Apache-2.0
"""The process of `fastvlm serve`: how it starts, and how it ends."""

import contextlib
import json
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("openai", reason="openai is not installed")

from http_running import PATIENCE, Process, Running, asks, load_tiny, request_bytes, running, until

from helpers import own_words
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.engines import TransformersEngine
from transformers_fastvlm.engines.continuous_rows import ContinuousRows
from transformers_fastvlm.server import Settings, listen, serve

TOKENS = 150


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """The tiny model, without a token that ends an answer."""
    folder = tmp_path / "endless"
    shutil.copytree(tiny_checkpoint(), folder)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token_id": None}))
    return folder


@pytest.fixture
def process(endless: Path) -> Iterator[Process]:
    one = Process("-m", str(endless), "--batch-size", "2", "--max-answer-tokens", str(TOKENS))
    yield one
    one.close()


def test_sigterm_finishes_what_was_taken_on(process: Process) -> None:
    server = process.wait_until_ready()

    def whole(_: int) -> int:
        status, answer, _ = server.post(asks(model="endless"))
        assert status == 200 and answer["choices"][0]["finish_reason"] == "length", answer
        return int(answer["usage"]["completion_tokens"])

    def streamed(_: int) -> int:
        with server.client() as client:
            options = {"include_usage": True}
            chunks = list(client.chat.completions.create(**asks(model="endless", stream=True, stream_options=options)))
        return int(chunks[-1].usage.completion_tokens)

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(whole if index % 2 else streamed, index) for index in range(6)]
        until(lambda: server.get("/health")[1]["requests"] == 6)
        process.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/health")[0] == 503)
        status, answer, _ = server.post(asks(model="endless"))
        assert status == 503 and answer["error"]["code"] == "shutting_down"
        assert [one.result(PATIENCE) for one in answers] == [TOKENS] * 6
    assert process.end() == 0
    log = [line for line in process.lines if "POST" in line]
    assert len(log) == 7 and sum(" 200 " in line for line in log) == 6
    assert not any("picture" in line or "WARN" in line or "Traceback" in line for line in process.lines)


def test_a_model_that_ended_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(*load_tiny()) as server:
        engine = server.service.engine
        monkeypatch.setattr(ContinuousRows, "step", lambda rows: (_ for _ in ()).throw(SystemExit))
        status, answer, _ = server.post(asks())
        assert status == 500 and answer["error"]["code"] == "internal_error"
        until(lambda: not engine.is_alive)
        assert server.get("/health")[:2] == (503, {"status": "failed", "requests": 0})
        status, answer, _ = server.post(asks())
        assert status == 503 and answer["error"]["code"] == "model_failed"


def test_serving_leaves_the_process_as_it_was() -> None:
    model, processor = load_tiny()

    def state() -> list[Any]:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return [Image.MAX_IMAGE_PIXELS, set(threading.enumerate()), handlers, list(warnings.filters)]

    before = state()
    seen: list[Any] = []

    def ready(url: str) -> None:
        threading.Thread(target=use, args=(url,)).start()

    def use(url: str) -> None:
        try:
            seen.append((Image.MAX_IMAGE_PIXELS, Running(None, url).post(asks(max_tokens=1))[0]))  # type: ignore[arg-type]
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    engine = TransformersEngine(model, processor)
    with listen("127.0.0.1", 0) as bound, contextlib.closing(engine):
        serve(engine, Settings(name="tiny", max_pixels=1000), bound, ready)
    assert seen == [(1000, 200)]
    until(lambda: set(threading.enumerate()) <= before[1])  # that of the client
    assert state() == before


def test_a_second_signal_ends_at_once(process: Process) -> None:
    server = process.wait_until_ready()
    with server.connect() as connection:
        connection.sendall(request_bytes(server.port, asks(model="endless", stream=True)))
        until(lambda: server.get("/health")[1]["requests"] == 1)
        process.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/health")[0] == 503)
        process.process.send_signal(signal.SIGTERM)
    assert process.end() == 128 + signal.SIGTERM


def test_tiny_starts_without_a_warning_and_names_itself() -> None:
    process = Process("-m", "tiny", "--api-key", "secret")
    try:
        server = process.wait_until_ready()
        said = own_words("\n".join(process.lines) + "\n")
        assert said == f"fastvlm: tiny (cpu, bfloat16) answers at {server.url}/v1; Ctrl-C stops it.\n"
        with server.client(api_key="secret") as client:
            assert client.models.retrieve("tiny").id == "tiny"
        busy = Process("-m", "tiny", "--port", str(server.port))
        assert busy.end() == 2 and "Choose another --port or --host" in busy.lines[-1]
        busy.close()
        process.process.send_signal(signal.SIGINT)
        assert process.end() == 0
    finally:
        process.close()
