# SPDX-License-Identifier: Apache-2.0
"""Scenes as a data set of conversations."""

import random
from typing import Any, Literal

from .content import KINDS, Scene, check_options, make_scene

DESCRIBE = "Describe the picture."

Task = Literal["captions", "conversations", "questions"]


class SceneDataset:
    """A map-style data set of synthetic scenes, drawn on access.

    A row is a dict of `messages` (role and content), `images` (one PIL image), `id`, and for `task="questions"` also
    `kind`.

    Args:
        length: number of rows.
        seed: selects the series of scenes; different seeds share no scene.
        task: "captions" for one turn that describes the scene; "conversations" for one turn per question, at most
            `max_turns` of them in random order, sometimes with the description among them; "questions" for a single
            question of the scene's kind.
        kinds: kinds of questions, some of `KINDS`.
        aspect: "any", "square" or "oblong" images.
        max_turns: maximum number of questions of a conversation.
        start: index of the first row's scene.

    Raises:
        ValueError: an argument is not one of these, or a number is out of range.
        IndexError: the row is out of range.

    Example:
        >>> row = SceneDataset(10, seed=7)[0]
        >>> [message["role"] for message in row["messages"]]
        ['user', 'assistant']
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        task: Task = "questions",
        kinds: tuple[str, ...] | list[str] = KINDS,
        aspect: str = "any",
        max_turns: int = 6,
        start: int = 0,
    ) -> None:
        if length < 1 or max_turns < 1 or start < 0:
            raise ValueError(
                f"length is {length}, max_turns {max_turns} and start {start}; expected at least 1, 1 and 0."
            )
        if task not in ("captions", "conversations", "questions"):
            raise ValueError(f"task is {task!r}; expected 'captions', 'conversations' or 'questions'.")
        check_options(tuple(kinds), aspect)
        self.length, self.seed, self.task, self.start = length, seed, task, start
        self.kinds, self.aspect, self.max_turns = tuple(kinds), aspect, max_turns

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """Return scene `index`, from 0, with all its questions."""
        if not 0 <= index < self.length:
            raise IndexError(f"Row {index} is out of range; the data set has rows 0 to {self.length - 1}.")
        return make_scene(self.seed, self.start + index, self.kinds, self.aspect)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        rng = random.Random(f"questions/{self.seed}/{self.start + index}")
        row: dict[str, Any] = {"id": f"scene-{self.seed}-{self.start + index}", "images": [scene.image]}
        if self.task == "captions":
            turns = [(DESCRIBE, scene.caption)]
        elif self.task == "conversations":
            chosen = rng.sample(scene.questions, min(self.max_turns, len(scene.questions)))
            turns = [(question.text, question.answer) for question in chosen]
            if rng.random() < 0.2:
                turns.insert(rng.randrange(len(turns)), (DESCRIBE, scene.caption))
        else:
            question = rng.choice([question for question in scene.questions if question.kind == scene.kind])
            turns = [(question.text, question.answer)]
            row["kind"] = question.kind
        messages = []
        for position, (question_text, answer) in enumerate(turns):
            start = "<image>\n" if position == 0 else ""
            messages.append({"role": "user", "content": start + question_text})
            messages.append({"role": "assistant", "content": answer})
        row["messages"] = messages
        return row
