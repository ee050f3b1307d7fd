# SPDX-License-Identifier: Apache-2.0
"""What the tests of vLLM have in common: conversations, Transformers' answers to them, and a server on a small CPU."""

import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import SceneDataset

START_SECONDS = 1800  # far more than it takes; a slow machine must not fail a test
ANSWER_SECONDS = 600
NAME = "tiny"
# 2026 is the series that no training of the embedded model uses.
SERIES = 2026
MAX_NEW_TOKENS = 16
# vLLM binds itself to cores by default, and two engines to the same ones.
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

Messages = list[dict[str, Any]]


def asked(*parts: str | Image.Image) -> Messages:
    """Return one message of a user, of texts and images."""
    kinds = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": kinds}]


def images_of(messages: Messages) -> list[Image.Image]:
    """Return the images of a conversation, in order."""
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def scene_questions(count: int, aspect: str = "any") -> tuple[list[Messages], list[str]]:
    """Return a question about each of `count` held-out scenes, and the right answers."""
    scenes = SceneDataset(count, seed=SERIES, aspect=aspect)
    conversations, answers = [], []
    for row in (scenes[index] for index in range(count)):
        question, answer = (message["content"] for message in row["messages"])
        conversations.append(asked(row["images"][0], question.removeprefix("<image>\n")))
        answers.append(answer)
    return conversations, answers


def mixed_batch(count: int) -> list[Messages]:
    """Return `count` conversations: with one image, two, none, and of several turns, in turn."""
    scenes, answers = scene_questions(count)
    mixed: list[Messages] = []
    for index, scene in enumerate(scenes):
        image, question = images_of(scene)[0], scene[0]["content"][1]["text"]
        other = images_of(scenes[index - 1])[0]
        later = {"role": "user", "content": "How many circles are there?"}
        mixed.append(
            (
                scene,
                asked("First:", image, "Second:", other, question),
                asked(f"What is {index} and {index}?"),
                [*scene, {"role": "assistant", "content": answers[index]}, later],
            )[index % 4]
        )
    return mixed


class Peer:
    """Transformers' `generate` on the same directory: the tokens that vLLM must give, too."""

    def __init__(self, directory: Any) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(directory)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()

    def prompt(self, messages: Messages) -> dict[str, Any]:
        """Return a conversation as `LLM.generate` takes it."""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = images_of(messages)
        return {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}

    @torch.inference_mode()
    def tokens(self, messages: Messages) -> list[int]:
        """Return the greedy tokens of the answer, its end included."""
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    def text(self, messages: Messages) -> str:
        """Return the greedy answer."""
        return self.processor.decode(self.tokens(messages), skip_special_tokens=True).strip()


def exact(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Return the percentage of answers that are right letter for letter."""
    return 100 * sum(given == right for given, right in zip(answers, expected, strict=True)) / len(expected)


class Server(NamedTuple):
    """A `vllm serve` that answers."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path


@contextlib.contextmanager
def serving(log: Path, *options: str, model: str | None = None) -> Iterator[Server]:
    """Run `vllm serve DIR`, with nothing said about the model, until the end of the block; no process outlives it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The last two are for a small machine; on a GPU, `vllm serve DIR` is all.
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model or str(tiny_checkpoint())]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME, "--dtype", "float32"]
    command += ["--limit-mm-per-prompt", '{"image": 3}', "--max-model-len", "1024"]
    command += ["--kv-cache-memory-bytes", str(1 << 28), "--enforce-eager", *options]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT}, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    family: list[psutil.Process] = []
    try:
        _wait_until_healthy(server)
        family = psutil.Process(process.pid).children(recursive=True)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
        for left in alive:
            left.kill()
    assert not alive, "the server's processes end with it"


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text(errors="replace")[-5000:]
        try:
            if httpx.get(f"{server.url}/health", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"not healthy after {START_SECONDS} s:\n{server.log.read_text(errors='replace')[-5000:]}")


def as_openai(messages: Messages) -> Messages:
    """Return messages with their images as data URLs."""
    sent = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [
                {"type": "image_url", "image_url": {"url": data_url(part["image"])}}
                if part["type"] == "image"
                else part
                for part in content
            ]
        sent.append({**message, "content": content})
    return sent


def data_url(image: Image.Image) -> str:
    held = io.BytesIO()
    image.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
