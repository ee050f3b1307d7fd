# SPDX-License-Identifier: Apache-2.0
"""Figures that others published, to put beside measured ones. None of them is measured here."""

__all__ = ["MODEL_CARD", "MODEL_CARD_SIDE", "PAPER_ENCODER_MS", "PAPER_SOURCE", "mean_accuracy"]

MODEL_CARD_SIDE = 1024

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

PAPER_ENCODER_MS: dict[int, float] = {256: 6.8, 768: 54.8, 1024: 116.3}
"""Milliseconds of FastViTHD by height and width in pixels: FastVLM, arXiv 2412.13303, table 10, Core ML on an Apple
M1 Max."""

PAPER_SOURCE = "paper, table 10 (M1 Max, Core ML)"


def mean_accuracy(size: str) -> float:
    """Return the mean over the tasks of the model card for "0.5B", "1.5B" or "7B"."""
    return sum(task[size] for task in MODEL_CARD.values()) / len(MODEL_CARD)
