# SPDX-License-Identifier: Apache-2.0
"""Captions as answers to generic questions: the form of the data of stage 1.5 (arXiv 2412.13303, section 4)."""

import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..tokens import IMAGE_TOKEN

__all__ = ["GENERIC", "AskedCaptions", "ask", "load_questions"]

GENERIC = "generic"


def load_questions(source: str) -> list[str]:
    """Return the questions of a text file, one per line, or with "generic" the package's questions.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has no questions, or a question contains "<image>".
    """
    if source == GENERIC:
        text = resources.files(__package__).joinpath("questions.txt").read_text(encoding="utf-8")
    else:
        text = Path(source).read_text(encoding="utf-8")
    questions = [line.strip() for line in text.splitlines() if line.strip()]
    if not questions:
        raise ValueError(f"{source} has no questions; expected one per line.")
    if marked := [question for question in questions if IMAGE_TOKEN in question]:
        raise ValueError(f"{source} has the question {marked[0]!r}; leave {IMAGE_TOKEN} out, it is added for you.")
    return questions


def ask(sample: dict[str, Any], questions: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Return a sample whose caption, its last answer, answers one of the questions, with the image before or after it.

    Question and position are drawn uniformly, seeded by the row's id and caption: they are the same in every epoch, on
    every process and in any order. (The package's chat templates move the only image of a turn to its front, as the
    reference code does.)

    Raises:
        ValueError: the sample does not have exactly one image, or has no answer.
    """
    answers = [message["content"] for message in sample["messages"] if message["role"] == "assistant"]
    if len(sample.get("images") or ()) != 1 or not answers:
        raise ValueError(
            f"{sample.get('place') or sample.get('id') or 'A row'} has {len(sample.get('images') or ())} images and "
            f"{len(answers)} answers; data.questions needs one image and its caption as the answer."
        )
    rng = random.Random(f"{seed}/{sample.get('id')}/{answers[-1]}")
    question = rng.choice(questions)
    content = f"{IMAGE_TOKEN}\n{question}" if rng.random() < 0.5 else f"{question}\n{IMAGE_TOKEN}"
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answers[-1]}]
    return {**sample, "messages": messages}


class AskedCaptions(torch.utils.data.Dataset[dict[str, Any]]):
    """A data set with `ask` applied to each row."""

    def __init__(self, dataset: Any, questions: Sequence[str], seed: int = 0) -> None:
        self.captions, self.questions, self.seed = dataset, list(questions), seed

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return ask(self.captions[index], self.questions, self.seed)
