# SPDX-License-Identifier: Apache-2.0
"""Train the tiny model to read dice with LoRA.

    python examples/finetune_lora.py WORK [--rows 1600]

Writes images of dice and a LLaVA file of conversations, fine-tunes the tiny model with the recipe `lora`, merges the
adapter, and counts right answers about other dice before training, with the adapter, and after merging.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data import load
from transformers_fastvlm.training import load_recipe, merge_adapter, run

QUESTION = "What does the die show?"
# The places of the pips, in thirds of the die, by the number that they make.
PIPS = {
    1: [(1, 1)],
    2: [(0, 0), (2, 2)],
    3: [(0, 0), (1, 1), (2, 2)],
    4: [(0, 0), (0, 2), (2, 0), (2, 2)],
    5: [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)],
    6: [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)],
}


def die(number: int, rng: random.Random) -> Image.Image:
    """Return an image of a die, 256 x 256 pixels, that shows `number`."""
    image = Image.new("RGB", (256, 256), tuple(rng.randint(60, 160) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    side = rng.uniform(150, 230)
    left, top = rng.uniform(6, 250 - side), rng.uniform(6, 250 - side)
    light, dark = rng.randint(225, 255), rng.randint(0, 50)
    face, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
    draw.rounded_rectangle((left, top, left + side, top + side), radius=side / 8, fill=(face, face, face))
    radius = side * rng.uniform(0.09, 0.12)
    turned = rng.random() < 0.5
    for column, row in PIPS[number]:
        column, row = (row, column) if turned else (column, row)
        x, y = left + side * (0.22 + 0.28 * column), top + side * (0.22 + 0.28 * row)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(ink, ink, ink))
    return image


def write_dice(folder: Path, name: str, rows: int, seed: int) -> Path:
    """Write images and a JSONL file of conversations about them; return the file."""
    rng = random.Random(seed)
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(rows):
        number = rng.randint(1, 6)
        file = f"{name}/{index}.png"
        die(number, rng).save(folder / file)
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": str(number)}]
        lines.append(json.dumps({"id": f"{name}-{index}", "image": file, "conversations": turns}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / f"{name}.jsonl"


@torch.inference_mode()
def answers(directory: Path, dice: Any) -> list[str]:
    """Return the greedy answers of the model of a directory, which may be an adapter's."""
    model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(directory)
    given: list[str] = []
    for start in range(0, len(dice), 20):
        rows = [dice[index] for index in range(start, min(start + 20, len(dice)))]
        texts = [processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True) for row in rows]
        inputs = processor(text=texts, images=[row["images"] for row in rows], padding=True, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        given += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return given


def main(arguments: list[str] | None = None) -> dict[str, list[str]]:
    """Write data, train, merge; print how many answers are right and return them all, with the expected ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="directory for the data and the results")
    parser.add_argument("--rows", type=int, default=1600, help="number of dice to train on")
    options = parser.parse_args(arguments)
    data = options.work / "dice"
    train_file, test_file = write_dice(data, "train", options.rows, 0), write_dice(data, "test", 120, 1)
    dice = load(test_file, image_folder=data)
    expected = [dice[index]["messages"][1]["content"] for index in range(len(dice))]
    given = {"before": answers(tiny_checkpoint(), dice)}
    overrides = [
        f"model.path={tiny_checkpoint()}",
        f"data.source={train_file}",
        f"data.image_folder={data}",
        f"output_dir={options.work / 'adapter'}",
        "train.learning_rate={language_model: 4e-3}",
        "train.global_batch_size=16",
        "train.precision=float32",
        "train.gradient_checkpointing=false",
        "lora.r=16",
        "lora.alpha=32",
        "export.merge_lora=false",
        "arguments.per_device_train_batch_size=16",
        "arguments.num_train_epochs=1",
        "arguments.logging_steps=20",
    ]
    run(load_recipe("lora", overrides), report=print)
    given["adapter"] = answers(options.work / "adapter", dice)
    merge_adapter(options.work / "adapter", options.work / "merged")
    given["merged"] = answers(options.work / "merged", dice)
    for name, those in given.items():
        right = sum(one == other for one, other in zip(those, expected, strict=True))
        print(f"{name:10}{right} of {len(expected)} dice read right")
    return {**given, "expected": expected}


if __name__ == "__main__":
    main()
