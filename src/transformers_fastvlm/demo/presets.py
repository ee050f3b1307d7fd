# SPDX-License-Identifier: Apache-2.0
"""Preset questions, and example images for tiny, the test model that ships with the package."""

from dataclasses import dataclass
from pathlib import Path

from ..data.scenes import SceneDataset
from ..data.scenes.dataset import DESCRIBE

__all__ = ["GENERAL", "SCENES", "Example", "Preset", "scene_examples"]


@dataclass(frozen=True)
class Preset:
    """A question and the label of its button."""

    label: str
    question: str


@dataclass(frozen=True)
class Example:
    """An image file and a question about it."""

    image: Path
    question: str


GENERAL = (
    Preset("Describe", "Describe this image in one or two sentences."),
    Preset("Read the text", "What text is written in this image?"),
    Preset("Count", "Which things are in this image, and how many of each?"),
)
"""Presets for models trained on photographs."""

SCENES = (
    Preset("Describe", DESCRIBE),
    Preset("Read the word", "Read the word."),
    Preset("Read the number", "Read the number."),
    Preset("Count", "How many shapes are there?"),
)
"""Presets for models trained on `transformers_fastvlm.data.scenes`, in its vocabulary."""

_EXAMPLE_KINDS = ("count", "relation", "word", "chart")


def scene_examples(folder: Path, seed: int = 2026) -> list[Example]:
    """Draw one scene each to count, to navigate, to read and to measure, and write them to `folder`.

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
