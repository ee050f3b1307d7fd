# SPDX-License-Identifier: Apache-2.0
"""The journal of an evaluation. Each answer is written to disk when it ends, so a killed evaluation can be resumed.

An answer is stored under a key of everything that it depends on: the checkpoint's files, the settings, the task, the
row and the question.
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
    """An answer in the journal.

    Attributes:
        text: the model's answer.
        prompt_tokens, completion_tokens: token counts from the engine.
        seconds: the answer's share of the time since the previous answers; the sum is the time of all answers.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class AnswerJournal(JournalFile):
    """An open journal, locked against other processes.

    Args:
        path: of the file. A missing file is created; an existing one is resumed.

    Raises:
        JournalError: the file is not a journal, is damaged before its end, or is in use.
        OSError: the file cannot be read or written.
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
        """Return the answer for a key from `answer_key`, or None if there is none."""
        return self._answers.get(key)

    def append(self, batch: Iterable[tuple[str, Journalled]]) -> None:
        """Write keys and answers to disk; they are durable when this returns."""
        answers = dict(batch)
        self.append_line({key: astuple(answer) for key, answer in answers.items()})
        self._answers |= answers

    def take(self, batch: Any) -> None:
        """Take in the answers of a stored batch."""
        self._answers |= {key: Journalled(*values) for key, values in batch.items()}


def answer_key(identity: Mapping[str, Any], task: str, doc_id: int | str, prompt: str, options: Any) -> str:
    """Return the key of an answer.

    Args:
        identity: JSON values that all answers depend on: the model's files and the settings.
        task: name of the task.
        doc_id: of the row in the task.
        prompt: the question.
        options: generation options, as JSON values.
    """
    return joined([json.dumps([identity, task, doc_id, prompt, options], sort_keys=True, default=str)])
