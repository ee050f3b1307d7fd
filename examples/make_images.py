# SPDX-License-Identifier: Apache-2.0
"""Draw examples/images, the images of the demo: scenes that the tiny model was not trained on.

python examples/make_images.py [DIRECTORY]
"""

import argparse
from pathlib import Path

from transformers_fastvlm.data.scenes import Scene, make_scene

IMAGES = Path(__file__).parent / "images"
SERIES = 2026
# File: the kinds of questions that its scene is for, and the scene's number.
SCENES = {
    "objects.png": (("attribute", "relation"), 2),
    "count.png": (("count",), 9),
    "sign.png": (("number", "word"), 14),
    "chart.png": (("chart",), 2),
}


def scene_of(name: str) -> Scene:
    """Return the scene that a file shows."""
    kinds, index = SCENES[name]
    return make_scene(SERIES, index, kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=IMAGES)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name in SCENES:
        scene = scene_of(name)
        scene.image.save(directory / name, optimize=True)
        print(f"{directory / name}: {scene.caption}")
        for question in scene.questions:
            print(f"    {question.text} {question.answer}")


if __name__ == "__main__":
    main()
