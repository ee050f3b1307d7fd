# SPDX-License-Identifier: Apache-2.0
"""How `vllm serve --shutdown-timeout` ends on SIGTERM: what runs is answered to its end, what comes later refused."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

import httpx
from vllm_running import ANSWER_SECONDS, NAME, Server, as_openai, mixed_batch, serving

TOKENS = 1400  # long enough, also on a busy machine, for the last request to come while the first is answered

# vLLM's own imports warn.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_sigterm_finishes_what_runs(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "log.txt", "--shutdown-timeout", str(ANSWER_SECONDS), "--max-model-len", "2048") as server,
        ThreadPoolExecutor(4) as pool,
    ):
        conversations = mixed_batch(4)
        ask(server, conversations[0], stream=False, tokens=1)  # the first has to wait for what is made once
        asked = [pool.submit(ask, server, messages, index % 2 == 0) for index, messages in enumerate(conversations)]
        until(lambda: in_engine(server) == len(asked) or any(one.done() for one in asked))
        server.process.terminate()
        until(lambda: "[shutdown] API server: stopping engine client mode=drain" in server.log.read_text())
        time.sleep(0.5)  # from its message to its deed
        assert not any(one.done() for one in asked), "the answers must be long enough to be cut"
        late = [refused(server, messages) for messages in conversations]
        assert [one.result(ANSWER_SECONDS) for one in asked] == [("length", TOKENS)] * len(asked)
        assert late == [True] * len(late)
        assert server.process.wait(ANSWER_SECONDS) == 0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + ANSWER_SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def in_engine(server: Server) -> int:
    """Return how many requests the engine answers at the moment, as the server counts them."""
    lines = httpx.get(f"{server.url}/metrics", timeout=ANSWER_SECONDS).text.splitlines()
    (value,) = (line.rpartition(" ")[2] for line in lines if line.startswith("vllm:num_requests_running{"))
    return int(float(value))


def body(messages: Any, stream: bool, tokens: int = TOKENS) -> dict[str, Any]:
    """Return a request whose answer has this many tokens."""
    return {
        "model": NAME,
        "messages": as_openai(messages),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }


def ask(server: Server, messages: Any, stream: bool, tokens: int = TOKENS) -> tuple[str, int]:
    """Return why the answer ended, and the number of its tokens."""
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body(messages, stream, tokens), timeout=ANSWER_SECONDS) as response:
        text = response.read().decode()
    assert response.status_code == 200, text
    if not stream:
        answer = json.loads(text)
        return answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    (reason,) = {
        choice["finish_reason"]
        for event in events
        for choice in event["choices"]
        if choice["finish_reason"] is not None
    }
    return reason, events[-1]["usage"]["completion_tokens"]


def refused(server: Server, messages: Any) -> bool:
    """Return whether a request is answered with an error, or its connection refused."""
    try:
        response = httpx.post(
            f"{server.url}/v1/chat/completions", json=body(messages, stream=False), timeout=ANSWER_SECONDS
        )
    except httpx.ConnectError:
        return True
    return response.status_code >= 500
