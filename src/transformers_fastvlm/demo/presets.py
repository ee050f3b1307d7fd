# SPDX-License-Identifier: Apache-2.0
"""Questions that are one press away, and example pictures for the model that comes with the package."""

from dataclasses import dataclass
from pathlib import Path

from ..data.scenes import SceneDataset
from ..data.scenes.dataset import DESCRIBE

__all__ = ["GENERAL", "SCENES", "Example", "Preset", "scene_examples"]


@dataclass(frozen=True)
class Preset:
    """A question, and what its button says."""

    label: str
    question: str


@dataclass(frozen=True)
class Example:
    """A picture's file and a question about it."""

    picture: Path
    question: str


GENERAL = (
    Preset("Describe", "Describe this picture in one or two sentences."),
    Preset("Read the text", "What text is written in this picture?"),
    Preset("Count", "Which things are in this picture, and how many of each?"),
)
"""For models that know photographs."""

SCENES = (
    Preset("Describe", DESCRIBE),
    Preset("Read the word", "Read the word."),
    Preset("Read the number", "Read the number."),
    Preset("Count", "How many shapes are there?"),
)
"""For models trained on `transformers_fastvlm.data.scenes`, in its own words."""

_EXAMPLE_KINDS = ("count", "relation", "word", "chart")


def scene_examples(folder: Path, seed: int = 2026) -> list[Example]:
    """Draw one scene each to count, to find one's way in, to read and to measure, and write them to `folder`.

    Raises:
        OSError: `folder` cannot be written to.
    """
    examples = []
    for index, kind in enumerate(_EXAMPLE_KINDS):
        row = SceneDataset(1, seed=seed, kinds=[kind], aspect="square", start=index)[0]
        path = folder / f"{kind}.png"
        row["images"][0].save(path)
        examples.append(Example(path, row["messages"][0]["content"].removeprefix("<image>\n")))
    return examples
