# SPDX-License-Identifier: Apache-2.0
"""`vllm serve DIR`, with nothing said about the model: chats, streams, bad requests, many clients at once."""

import base64
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

import httpx
import openai
import psutil
from vllm_running import (
    ANSWER_SECONDS,
    MAX_NEW_TOKENS,
    NAME,
    Messages,
    Peer,
    as_openai,
    asked,
    data_url,
    images_of,
    mixed_batch,
    scene_questions,
    serving,
)

from transformers_fastvlm.checkpoints import tiny_checkpoint

# vLLM's own imports warn.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def peer() -> Peer:
    return Peer(tiny_checkpoint())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serves a directory with every file of Apple's repositories, whose code must not run."""
    directory = tmp_path_factory.mktemp("server") / "FastVLM-0.5B"
    shutil.copytree(tiny_checkpoint(), directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    code = {"AutoConfig": "llava_qwen.LlavaConfig", "AutoModelForCausalLM": "llava_qwen.LlavaQwen2ForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    (directory / "llava_qwen.py").write_text("raise RuntimeError('the code of the repository was run')\n")
    with serving(directory.parent / "log.txt", model=str(directory)) as one:
        yield one.url


def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=ANSWER_SECONDS, max_retries=0)


def answer(server: str, messages: Messages, **options: Any) -> str:
    """Return the greedy answer of the server."""
    options = {"max_tokens": MAX_NEW_TOKENS, "temperature": 0, **options}
    with client(server) as api:
        done = api.chat.completions.create(model=NAME, messages=as_openai(messages), **options)
    return (done.choices[0].message.content or "").strip()


def post(server: str, content: Any, **more: Any) -> httpx.Response:
    body = {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{server}/v1/chat/completions", json={**body, **more}, timeout=ANSWER_SECONDS)


def test_models(server: str) -> None:
    with client(server) as api:
        assert [model.id for model in api.models.list()] == [NAME]


def test_chat_completions(server: str, peer: Peer) -> None:
    conversations = mixed_batch(8)
    assert [answer(server, one) for one in conversations] == [peer.text(one) for one in conversations]


def test_stream(server: str, peer: Peer) -> None:
    (messages,), _ = scene_questions(1)
    messages = asked(images_of(messages)[0], "Describe the picture.")
    body = {"model": NAME, "messages": as_openai(messages), "max_tokens": MAX_NEW_TOKENS, "temperature": 0}
    with httpx.stream(
        "POST", f"{server}/v1/chat/completions", json={**body, "stream": True}, timeout=ANSWER_SECONDS
    ) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert len(lines) > 3 and lines[-1] == "data: [DONE]"
    with client(server) as api, api.chat.completions.create(**body, stream=True) as pieces:
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text.strip() == peer.text(messages)


def test_bad_requests_leave_the_engine_alive(server: str, peer: Peer, tmp_path: Path) -> None:
    (messages,), _ = scene_questions(1)
    scene_image = images_of(messages)[0]
    file = tmp_path / "picture.png"
    scene_image.save(file)

    def image(url: str) -> list[dict[str, Any]]:
        return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]

    cases = {
        "a place without an image": ([{"type": "text", "text": "<image> What is it?"}], {}),
        "a place too many": ([*image(data_url(scene_image)), {"type": "text", "text": "<image>"}], {}),
        "too many images": (image(data_url(scene_image)) * 4, {}),
        "a file": (image(file.as_uri()), {}),
        "a path": (image(str(file)), {}),
        "no picture": (image("data:image/png;base64," + base64.b64encode(b"no picture").decode()), {}),
        "half a picture": (image(data_url(scene_image)[:200]), {}),
        "no base64": (image("data:image/png;base64,%%%%"), {}),
        "nobody there": (image("http://127.0.0.1:9/picture.png"), {}),
        "too long": ("word " * 3000, {}),
        "too many tokens": ("Hello", {"max_tokens": 5000}),
        "no such type": ([{"type": "hologram", "hologram": "x"}], {}),
    }
    found = {name: post(server, content, **more) for name, (content, more) in cases.items()}
    codes = {name: response.status_code for name, response in found.items()}
    # vLLM blames itself for these two.
    assert {name: code for name, code in codes.items() if not 400 <= code < 500} == {"a file": 500, "nobody there": 500}
    assert "Cannot load local files" in found["a file"].text
    assert "1 <image>, but 0 images" in found["a place without an image"].text
    assert "2 <image>, but 1 images" in found["a place too many"].text
    assert post(server, "Hello", model="another").status_code == 404
    broken = httpx.post(f"{server}/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert 400 <= broken.status_code < 500
    assert answer(server, messages) == peer.text(messages)


def load(server: str, peer: Peer, clients: int, requests: int) -> None:
    """Ask from many clients at once, each its own series of questions; every answer must be that of one alone."""
    conversations = mixed_batch(16)
    expected = [peer.text(one) for one in conversations]

    def run(number: int) -> list[bool]:
        order = [(number + step) % len(conversations) for step in range(requests)]
        return [answer(server, conversations[index]) == expected[index] for index in order]

    with ThreadPoolExecutor(clients) as pool:
        right = [same for run_of_one in pool.map(run, range(clients)) for same in run_of_one]
    assert len(right) == clients * requests and all(right)


def test_many_clients(server: str, peer: Peer) -> None:
    load(server, peer, clients=16, requests=2)


@pytest.mark.soak
def test_many_clients_for_long(server: str, peer: Peer) -> None:
    load(server, peer, clients=16, requests=10)
    before = memory(server)
    load(server, peer, clients=16, requests=10)
    assert memory(server) - before < 100 << 20


def memory(server: str) -> int:
    """Return the bytes that the server's processes hold of their own."""
    port = int(server.rsplit(":", 1)[1])
    (listener,) = {
        found.pid for found in psutil.net_connections("tcp") if found.status == "LISTEN" and found.laddr.port == port
    }
    process = psutil.Process(listener)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])
