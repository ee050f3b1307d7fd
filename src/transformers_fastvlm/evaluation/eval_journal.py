# SPDX-License-Identifier: Apache-2.0
"""The answers of an evaluation, on the disk after every batch, so that it can be killed at any moment and resumed.

An answer is found again by all that it depends on: the checkpoint's files, the settings, the task, the row and what was
asked.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ..storage.digests import joined
from ..storage.journal_file import JournalFile

__all__ = ["AnswerJournal", "Journalled", "answer_key"]


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


class AnswerJournal(JournalFile):
    """An open journal, which no other process has open.

    Args:
        path: of the file; it is created, or resumed.

    Raises:
        JournalError: the file is no journal, is damaged before its end, or in use.
        OSError: it cannot be read or written.
    """

    kind = "fastvlm_eval"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._answers: dict[str, Journalled] = {}
        super().__init__(Path(path))
        if self.header is None:
            self.begin({})

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Journalled | None:
        """Return the answer of `answer_key`'s key, or None if there is none."""
        return self._answers.get(key)

    def append(self, batch: Iterable[tuple[str, Journalled]]) -> None:
        """Write a batch of keys and answers; when this returns, they are on the disk."""
        answers = dict(batch)
        self.append_line({key: astuple(answer) for key, answer in answers.items()})
        self._answers |= answers

    def take(self, batch: Any) -> None:
        """Note the answers of a batch that is there."""
        self._answers |= {key: Journalled(*values) for key, values in batch.items()}


def answer_key(identity: Mapping[str, Any], task: str, doc_id: int | str, prompt: str, options: Any) -> str:
    """Return the key of an answer.

    Args:
        identity: JSON values of what all answers depend on: the model's files and the settings.
        task: name of the task.
        doc_id: of the row in the task.
        prompt: what is asked.
        options: JSON values of how the answer is generated.
    """
    return joined([json.dumps([identity, task, doc_id, prompt, options], sort_keys=True, default=str)])
