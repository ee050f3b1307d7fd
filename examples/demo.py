# SPDX-License-Identifier: Apache-2.0
"""Answer questions about images, offline, with the small model that ships with the package.

    python examples/demo.py [--image FILE --question TEXT] [--model CHECKPOINT] [--out demo_output.png]

Runs `fastvlm generate` for four bundled images, or for one of yours, prints questions and answers, and writes an image
that shows both. The small model has 3.8 million parameters and knows drawn scenes only; --model takes another one.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from transformers.utils import logging

from transformers_fastvlm.cli import main as fastvlm

IMAGES = Path(__file__).parent / "images"
QUESTIONS = (
    (IMAGES / "sign.png", "What number is written?"),
    (IMAGES / "sign.png", "Read the word."),
    (IMAGES / "objects.png", "Is the yellow star left or right of the blue square?"),
    (IMAGES / "count.png", "How many stars are there?"),
    (IMAGES / "chart.png", "How high is the yellow bar?"),
    (IMAGES / "chart.png", "Which bar is the highest?"),
)
COLUMNS, CELL, MARGIN = 3, 360, 24


def ask(model: str, file: Path, question: str) -> dict[str, Any]:
    """Run `fastvlm generate --json` and return what it printed."""
    command = ["generate", os.path.relpath(file), "-p", question, "--model", model, "--json"]
    print("$", shlex.join(["fastvlm", *command]))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            fastvlm(command)
        except SystemExit as stop:
            if stop.code:
                raise
    result: dict[str, Any] = json.loads(printed.getvalue())
    return result


def cell(file: Path, question: str, answer: str) -> Image.Image:
    """Return an image, CELL pixels wide or high, with question and answer under it."""
    lines = [(line, "#1d1f23") for line in textwrap.wrap(question, 36)]
    lines += [(line, "#0b5fa5") for line in textwrap.wrap(answer, 36) or ["(nothing)"]]
    with Image.open(file) as image:
        shown = image.convert("RGB")
    scale = CELL / max(shown.size)
    shown = shown.resize((max(1, round(shown.width * scale)), max(1, round(shown.height * scale))))
    page = Image.new("RGB", (CELL, shown.height + 16 + 30 * len(lines)), "white")
    page.paste(shown, ((CELL - shown.width) // 2, 0))
    pen = ImageDraw.Draw(page)
    for number, (text, colour) in enumerate(lines):
        pen.text((4, shown.height + 10 + 30 * number), text, fill=colour, font=ImageFont.load_default(size=21))
    return page


def draw(cells: list[Image.Image]) -> Image.Image:
    """Return a page with the cells side by side, COLUMNS in a row."""
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [max(one.height for one in row) + MARGIN for row in rows]
    page = Image.new("RGB", (len(rows[0]) * (CELL + MARGIN) + MARGIN, sum(heights) + MARGIN), "white")
    for number, row in enumerate(rows):
        for column, one in enumerate(row):
            page.paste(one, (MARGIN + column * (CELL + MARGIN), MARGIN + sum(heights[:number])))
    return page


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, ask, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", type=Path, help="image to ask about instead of the bundled ones")
    parser.add_argument("--question", default="Describe the picture.", help="what to ask about --image")
    parser.add_argument("--model", default="tiny", help="a checkpoint to ask instead of the embedded model")
    parser.add_argument("--out", type=Path, default=Path("demo_output.png"), help="image to write")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    cells = []
    for file, question in [(options.image, options.question)] if options.image else QUESTIONS:
        result = ask(options.model, file, question)
        print(f"question  {question}")
        print(f"answer    {result['answer']}\n")
        cells.append(cell(file, question, result["answer"]))
    draw(cells).save(options.out)
    print(f"images with questions and answers: {options.out}")


if __name__ == "__main__":
    main()
