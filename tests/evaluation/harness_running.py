# SPDX-License-Identifier: Apache-2.0
"""What the tests of the harness share: an engine that says what a test wants, and scenes as a user's own data."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.engines.base import Answer, Sampling

HELD_OUT_SERIES = 2026


class ScriptedEngine:
    """Answers with what `say` returns for the words of a conversation, and remembers what it was asked."""

    dtype = "float32"
    batch_size = None

    def __init__(self, say: Callable[[str], str]) -> None:
        self.say = say
        self.asked: list[tuple[str, list[Any], int]] = []

    def stream(self, conversation: Any, sampling: Sampling) -> Any:
        (message,) = conversation
        text = "\n".join(part["text"] for part in message["content"] if part["type"] == "text")
        images = [part["image"] for part in message["content"] if part["type"] == "image"]
        self.asked.append((text, images, sampling.max_new_tokens))
        answer = Answer(text=self.say(text), finish_reason="stop", prompt_tokens=len(text), completion_tokens=1)
        return SimpleNamespace(result=lambda: answer, when_done=lambda call: call())

    def close(self) -> None:
        pass


def write_scenes(folder: Path, count: int) -> Path:
    """Write scenes that no training used as a user's own data, and return the file."""
    (folder / "pictures").mkdir(parents=True)
    scenes = SceneDataset(count, seed=HELD_OUT_SERIES, task="questions", aspect="any")
    with open(folder / "scenes.jsonl", "w", encoding="utf-8") as file:
        for index in range(count):
            row = scenes[index]
            question, answer = (message["content"] for message in row["messages"])
            name = f"pictures/{index}.png"
            row["images"][0].save(folder / name)
            file.write(
                json.dumps({"image": name, "question": question.removeprefix("<image>\n"), "answer": answer}) + "\n"
            )
    return folder / "scenes.jsonl"


def fastvlm(*words: str | Path) -> subprocess.Popen:
    """Start the command in a process of its own, without a network."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "transformers_fastvlm", *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    """Wait for a command that must end well and return what it printed on standard output."""
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return out


def kill_after(process: subprocess.Popen, journal: Path, lines: int) -> None:
    """Kill a command as soon as its journal has so many lines after its first one, or let it end before that."""
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") <= lines):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
