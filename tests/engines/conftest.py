# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the engines' tests: images, and conversations about them."""

from pathlib import Path
from typing import Any

import pytest
from engine_cases import QUESTION, ask
from PIL import Image


@pytest.fixture(scope="session")
def images(golden: Path) -> list[Image.Image]:
    """A wide and a tall image."""
    opened = []
    for name in ("wide_rgb.png", "tall_rgb.jpg"):
        with Image.open(golden / "images" / name) as image:
            opened.append(image.copy())
    return opened


@pytest.fixture(scope="session")
def mixed(images: list[Image.Image]) -> list[list[dict[str, Any]]]:
    """Conversations of several lengths: without an image, with one, and with two."""
    wide, tall = images
    return [
        ask(QUESTION, wide),
        ask("Hi"),
        ask("What is the difference? Answer in a few words, and say which one is older, and why.", wide, tall),
        ask(QUESTION, tall, system="Be brief."),
        ask("Read the text."),
        ask("What colour is it, and what is to the left of it?", tall),
        ask(QUESTION, wide.convert("L")),
    ]
