# SPDX-License-Identifier: Apache-2.0
"""A server of `fastvlm serve` on a free port, in a thread or a process, and small ways of talking to it."""

import base64
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from PIL import Image

from transformers_fastvlm.engines import TransformersEngine
from transformers_fastvlm.server import Settings, listen
from transformers_fastvlm.server.application import Service
from transformers_fastvlm.server.server import server_of

SOURCE = Path(__file__).parents[2] / "src"
PATIENCE = 240.0
"""Seconds after which something that must come is given up; never what a test measures."""


class Running:
    """A server that runs: its service, and its address."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url
        self.port = int(url.rpartition(":")[2])

    def client(self, **options: Any) -> Any:
        """Return OpenAI's client, which does not try again by itself."""
        import openai

        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options)

    def post(self, body: Any, **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Ask for a chat completion; return status, JSON and headers."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
        return self.send(urllib.request.Request(f"{self.url}/v1/chat/completions", data, fields))

    def get(self, path: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        return self.send(urllib.request.Request(self.url + path))

    def send(self, request: urllib.request.Request) -> tuple[int, dict[str, Any], dict[str, str]]:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, json.load(response), lower(response.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error), lower(error.headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)


def lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@contextlib.contextmanager
def running(model: Any, processor: Any, send_buffer: int | None = None, **settings: Any) -> Iterator[Running]:
    """Serve a model until the end of the block, and then drain; `send_buffer` is the system's, for each client."""
    chosen = Settings(**{"name": "tiny"} | settings)
    engine = TransformersEngine(model, processor, batch_size=chosen.batch_size)
    service = Service(engine, chosen)
    bound = listen("127.0.0.1", 0)
    if send_buffer is not None:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    urls: list[str] = []
    server = server_of(service, bound, urls.append)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        until(lambda: bool(urls) or not thread.is_alive())
        yield Running(service, urls[0])
    finally:
        service.draining = True
        thread.join(PATIENCE)
        engine.close()
        bound.close()
        assert not thread.is_alive()


class Process:
    """`fastvlm serve`, and what it wrote so far."""

    def __init__(self, *arguments: str) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "transformers_fastvlm", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        self.lines: list[str] = []
        assert self.process.stderr is not None and self.process.stdout is not None
        self.reader = threading.Thread(target=self._read, args=(self.process.stderr,))
        self.reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.lines.append(line.decode().rstrip())

    def wait_until_ready(self) -> Running:
        until(lambda: bool(self.urls()) or self.process.poll() is not None)
        assert self.urls(), self.lines
        return Running(None, self.urls()[0])  # type: ignore[arg-type]

    def urls(self) -> list[str]:
        return [found[1] for line in list(self.lines) if (found := re.search(r"answers at (http://\S+)/v1;", line))]

    def end(self) -> int:
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code

    def close(self) -> None:
        self.process.kill()
        self.end()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def data_url(image: Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def shows(url: str, text: str) -> dict[str, Any]:
    """Return a user's message with an image."""
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}],
    }


def asks(text: str = "What is in the picture?", **fields: Any) -> dict[str, Any]:
    """Return a request with a text alone."""
    return {"model": "tiny", "messages": [{"role": "user", "content": text}]} | fields


def head(port: int, length: str) -> bytes:
    """Return the head of a request whose body comes by hand."""
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Type: application/json", length]
    return "\r\n".join([*lines, "", ""]).encode()


def request_bytes(port: int, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return head(port, f"Content-Length: {len(data)}") + data


def load_tiny() -> tuple[Any, Any]:
    """Return the model of the package and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from transformers_fastvlm.checkpoints import tiny_checkpoint

    directory = tiny_checkpoint()
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    return model, AutoProcessor.from_pretrained(directory)


def never_ending(model: Any) -> Any:
    """Let a model answer up to the limit of tokens."""
    model.generation_config.eos_token_id = None
    return model
