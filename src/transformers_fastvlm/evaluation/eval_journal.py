# SPDX-License-Identifier: Apache-2.0
"""The answers of an evaluation, on the disk after every batch, so that it can be killed at any moment and go on.

A line holds one batch. Lines are only ever appended; one that was cut off by a kill is dropped. An answer is found
again by all that it depends on: the checkpoint's files, the settings, the task, the row and what was asked.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.embedded import resolve_model

__all__ = ["AnswerJournal", "Journalled", "answer_key", "model_identity"]

_MODEL_FILES = (".json", ".safetensors", ".txt", ".jinja", ".model", ".bin", ".onnx", ".onnx_data")


@dataclass(frozen=True)
class Journalled:
    """An answer that is on the disk.

    Attributes:
        text: what the model said.
        prompt_tokens, completion_tokens: as the engine counted them.
        seconds: its share of the time that the engine took for its batch.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class AnswerJournal:
    """An open journal, which no other process has open.

    Args:
        path: of the file; it is created, or gone on with.

    Raises:
        ValueError: the file is no journal, is damaged before its end, or in use.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._answers: dict[str, Journalled] = {}
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        try:
            self._lock()
            end = self._read()
            os.ftruncate(self._file, end)
            os.lseek(self._file, end, os.SEEK_SET)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Journalled | None:
        """Return the answer of `answer_key`'s key, or None if there is none."""
        return self._answers.get(key)

    def append(self, batch: Iterable[tuple[str, Journalled]]) -> None:
        """Write a batch of keys and answers; when this returns, they are on the disk."""
        answers = dict(batch)
        entries = {
            key: [answer.text, answer.prompt_tokens, answer.completion_tokens, answer.seconds]
            for key, answer in answers.items()
        }
        line = memoryview(json.dumps(entries).encode("ascii") + b"\n")
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)
        self._answers |= answers

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _lock(self) -> None:
        """Keep other processes out; the system lifts the lock when this one ends, however it ends."""
        try:
            import fcntl
        except ImportError:  # Windows has no such locks
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is in use by another evaluation; wait until that ends, or name another --out."
            ) from None

    def _read(self) -> int:
        """Take what is there and return where the next line belongs."""
        size, end = os.fstat(self._file).st_size, 0
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    entries = json.loads(line) if line.endswith(b"\n") else None
                    self._answers |= {key: Journalled(*values) for key, values in entries.items()}  # type: ignore[union-attr]
                except (ValueError, TypeError, AttributeError) as error:
                    if end + len(line) == size:
                        break  # cut off by a kill
                    raise ValueError(
                        f"{self.path} is damaged at byte {end}. Delete it to begin again, or name another --out."
                    ) from error
                end += len(line)
        return end


def answer_key(identity: Mapping[str, Any], task: str, doc_id: int | str, prompt: str, options: Any) -> str:
    """Return the key of an answer.

    Args:
        identity: JSON values of what all answers depend on: the model's files and the settings.
        task: name of the task.
        doc_id: of the row in the task.
        prompt: what is asked.
        options: JSON values of how the answer is generated.
    """
    parts = [identity, task, doc_id, hashlib.sha256(prompt.encode("utf-8", "backslashreplace")).hexdigest(), options]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def model_identity(model: str) -> dict[str, str]:
    """Return digests of all of a checkpoint's files, or the commit of one on the hub.

    Raises:
        OSError: there is no such checkpoint, or a file cannot be read.
    """
    model = resolve_model(model)
    if os.path.isdir(model):
        found = sorted(path for path in Path(model).rglob("*") if path.suffix in _MODEL_FILES and path.is_file())
        return {path.relative_to(model).as_posix(): _digest(path) for path in found}
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    return {"commit": str(extract_commit_hash(cached_file(model, "config.json"), None))}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
