# SPDX-License-Identifier: Apache-2.0
"""Apple's published figures about its checkpoints, for comparison with measurements. None of them is measured here."""

import re

__all__ = [
    "MODEL_CARD",
    "MODEL_CARD_SIDE",
    "MODEL_CARD_TASKS",
    "PAPER_ENCODER_MS",
    "PAPER_FIRST_TOKEN_MS",
    "PAPER_SOURCE",
    "SIZES",
    "mean_accuracy",
    "published_size",
]

MODEL_CARD_SIDE = 1024

SIZES = ("0.5B", "1.5B", "7B")

MODEL_CARD: dict[str, dict[str, float]] = {
    "AI2D": {"0.5B": 68.0, "1.5B": 77.4, "7B": 83.6},
    "ScienceQA": {"0.5B": 85.2, "1.5B": 94.4, "7B": 96.7},
    "MMMU": {"0.5B": 33.9, "1.5B": 37.8, "7B": 45.4},
    "VQAv2": {"0.5B": 76.3, "1.5B": 79.1, "7B": 80.8},
    "ChartQA": {"0.5B": 76.0, "1.5B": 80.1, "7B": 85.0},
    "TextVQA": {"0.5B": 64.5, "1.5B": 70.4, "7B": 74.9},
    "InfoVQA": {"0.5B": 46.4, "1.5B": 59.7, "7B": 75.8},
    "DocVQA": {"0.5B": 82.5, "1.5B": 88.3, "7B": 93.2},
    "OCRBench": {"0.5B": 63.9, "1.5B": 70.2, "7B": 73.1},
    "RealWorldQA": {"0.5B": 56.1, "1.5B": 61.2, "7B": 67.2},
    "SEED-Image": {"0.5B": 71.0, "1.5B": 74.2, "7B": 75.4},
}
"""Percent by task and size: the model card of Apple's FastVLM-0.5B, -1.5B and -7B, at `MODEL_CARD_SIDE` pixels."""

MODEL_CARD_TASKS: dict[str, str] = {
    "ai2d": "AI2D",
    "scienceqa_img": "ScienceQA",
    "mmmu_val": "MMMU",
    "vqav2_val": "VQAv2",
    "chartqa": "ChartQA",
    "textvqa_val": "TextVQA",
    "infovqa_val": "InfoVQA",
    "docvqa_val": "DocVQA",
    "ocrbench": "OCRBench",
    "realworldqa": "RealWorldQA",
    "seedbench": "SEED-Image",
}
"""Rows of the model card by the name of the task in lmms-eval."""

PAPER_FIRST_TOKEN_MS: dict[str, float] = {"0.5B": 166.0, "1.5B": 233.0, "7B": 641.0}
"""Milliseconds of encoder and prefill by size at `MODEL_CARD_SIDE` pixels on an Apple M1 Max: FastVLM, arXiv
2412.13303."""

PAPER_ENCODER_MS: dict[int, float] = {256: 6.8, 768: 54.8, 1024: 116.3}
"""Milliseconds of FastViTHD by height and width in pixels: FastVLM, arXiv 2412.13303, table 10, Core ML on an Apple
M1 Max."""

PAPER_SOURCE = "paper, table 10 (M1 Max, Core ML)"

_SIZE = re.compile(r"(?<![\d.])(0\.5b|1\.5b|7b)(?![a-z\d])", re.IGNORECASE)


def mean_accuracy(size: str) -> float:
    """Return the mean over the tasks of the model card for "0.5B", "1.5B" or "7B"."""
    return sum(task[size] for task in MODEL_CARD.values()) / len(MODEL_CARD)


def published_size(model: str) -> str | None:
    """Return "0.5B", "1.5B" or "7B" if the last part of a directory's or repository's name has exactly one of them."""
    found = {size.upper() for size in _SIZE.findall(re.split(r"[\\/]", model.rstrip("\\/"))[-1])}
    return found.pop() if len(found) == 1 else None
