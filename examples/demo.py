# SPDX-License-Identifier: Apache-2.0
"""Answer a question about a picture, offline, with a tiny model built on the spot.

    python examples/demo.py [--image FILE] [--question TEXT] [--model CHECKPOINT] [--out demo_output.png]

Builds an untrained FastVLM and its tokenizer from a seed, writes them as a checkpoint laid out as Apple's, asks it
through `fastvlm generate`, and draws the picture with question and answer under it. The way from picture to words is
that of the published models; the words themselves are noise, since nothing was learned. With --model the question goes
to a real checkpoint.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import models
from tokenizers.pre_tokenizers import ByteLevel
from transformers.utils import logging

from transformers_fastvlm import FastVLMConfig, FastVLMForConditionalGeneration
from transformers_fastvlm.checkpoints import convert
from transformers_fastvlm.cli import main as fastvlm

PICTURE = Path(__file__).parent / "images" / "street.jpg"
QUESTION = "What number is on the sign?"
NOISE = "This model is untrained: its words are noise."
SEED = 42
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# What the noise is made of; an untrained head over bytes would hardly ever hit a printable character.
WORDS = """
a and at blue by car cloud day door far field grass green hill house in is long near not of old on over red road
roof seen sign sky slow some stone sun that the there tree two under wall warm white wide wind window with yes
"""


def build_tokenizer(directory: Path) -> dict[str, int]:
    """Write a byte-level tokenizer in Qwen2's files and return its vocabulary: 256 bytes, words, special tokens."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in WORDS.split():
        piece = "\u0120"  # a space, as byte-level tokenizers write it
        for letter in word:
            if piece + letter not in vocabulary:
                vocabulary[piece + letter] = len(vocabulary)
                merges.append((piece, letter))
            piece += letter
    models.BPE(vocabulary, merges).save(str(directory))
    special = {token: len(vocabulary) + index for index, token in enumerate(SPECIAL_TOKENS)}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(index): {"content": token, "special": True} for token, index in special.items()},
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return vocabulary | special


def build_checkpoint(directory: Path) -> Path:
    """Write an untrained FastVLM of under a million parameters, laid out as Apple's checkpoints, and return where."""
    parts = directory / "parts"
    parts.mkdir()
    vocabulary = build_tokenizer(parts)
    rows = len(vocabulary) + 1
    config = FastVLMConfig(
        vision_config={
            "image_size": 512,
            "depths": [1, 1, 2, 1, 1],
            "hidden_sizes": [8, 16, 32, 64, 128],
            "projection_dim": 0,
            "layer_scale_init_value": 1.0,
            "initializer_range": 0.2,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": rows,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.3,
            "eos_token_id": vocabulary["<|im_end|>"],
            "pad_token_id": vocabulary["<|endoftext|>"],
        },
        image_token_id=rows - 1,
    )
    torch.manual_seed(SEED)
    model = FastVLMForConditionalGeneration(config)
    words = torch.tensor([vocabulary[f"\u0120{word}"] for word in WORDS.split()])
    with torch.no_grad():
        # Other tokens get the logit 0, which the largest of the words' exceeds.
        head = torch.zeros_like(model.lm_head.weight)
        head[words] = model.lm_head.weight[words]
        model.lm_head.weight.copy_(head)
    model.save_pretrained(parts)
    return convert(parts, directory / "fastvlm-noise", "apple").directory


def ask(model: str, picture: Path, question: str) -> dict[str, Any]:
    """Run `fastvlm generate --json` and return what it printed."""
    command = ["generate", os.path.relpath(picture), "-p", question, "--model", model]
    command += ["--max-new-tokens", "12", "--json"]
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


def draw(picture: Path, question: str, answer: str, note: str) -> Image.Image:
    """Return the picture with the question, the answer and a note under it."""
    width, margin = 960, 36
    lines = [(line, 34, "#1d1f23") for line in textwrap.wrap(question, 52)]
    lines += [(line, 34, "#0b5fa5") for line in textwrap.wrap(answer, 52) or ["(nothing)"]]
    lines += [(line, 22, "#7a7f87") for line in textwrap.wrap(note, 84)]
    with Image.open(picture) as image:
        shown = image.convert("RGB")
    shown = shown.resize((width, max(1, round(shown.height * width / shown.width))), Image.Resampling.LANCZOS)
    page = Image.new(
        "RGB", (width, shown.height + 2 * margin + sum(round(size * 1.45) for _, size, _ in lines)), "white"
    )
    page.paste(shown)
    pen, down = ImageDraw.Draw(page), shown.height + margin
    for text, size, colour in lines:
        pen.text((margin, down), text, fill=colour, font=ImageFont.load_default(size=size))
        down += round(size * 1.45)
    return page


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, ask, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", type=Path, default=PICTURE, help="picture to ask about")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--model", help="a checkpoint to ask instead of the untrained model")
    parser.add_argument("--out", type=Path, default=Path("demo_output.png"), help="picture to write")
    options = parser.parse_args(arguments)
    note = "" if options.model else NOISE
    with tempfile.TemporaryDirectory() as folder:
        logging.disable_progress_bar()
        model = options.model or str(build_checkpoint(Path(folder)))
        result = ask(model, options.image, options.question)
    tokens = result["tokens"]
    print(f"question  {options.question}")
    print(f"answer    {result['answer']}")
    print(f"          {tokens['image']} image tokens, {tokens['prompt']} in the prompt, {tokens['answer']} answered")
    if note:
        print(f"\n{note}\nA trained checkpoint goes the same way: add --model, or use `fastvlm generate` itself.")
    draw(options.image, options.question, result["answer"], note).save(options.out)
    print(f"\npicture with question and answer: {options.out}")


if __name__ == "__main__":
    main()
