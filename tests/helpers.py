# SPDX-License-Identifier: Apache-2.0
"""Small functions that several test modules need."""

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

IMAGE_SENTINEL = -200

# The equivalent of `filterwarnings` in pyproject.toml for subprocesses. Python's -W cannot tell whose deprecations they
# are.
WARNINGS_ARE_ERRORS = ["-W", "error"]
for _category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning", "SyntaxWarning"):
    WARNINGS_ARE_ERRORS += ["-W", f"ignore::{_category}"]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference divided by the norm of the reference, in float64."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    reference = reference.double()
    return float((ours.double() - reference).norm() / reference.norm())


def golden_images(golden: Path, names: list[str]) -> list[Image.Image]:
    """Open golden images as the reference did."""
    return [Image.open(golden / "images" / name).convert("RGB") for name in names]


def image_names(case: dict[str, Any]) -> list[str]:
    """Return the names of the images of a case in expected.json."""
    return case.get("images") or ([case["image"]] if "image" in case else [])


def expand(ids: list[int], lengths: list[int], image_token_id: int, fill: int | None = None) -> list[int]:
    """Replace each image sentinel in `ids` by as many `fill` (default: placeholders) as its image has tokens."""
    remaining = list(lengths)
    out: list[int] = []
    for token in ids:
        if token == IMAGE_SENTINEL:
            out += [image_token_id if fill is None else fill] * remaining.pop(0)
        else:
            out.append(token)
    assert not remaining
    return out


def random_pixels(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return reproducible pixel values (count, 3, height, width) in 0 to 1."""
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(seed))


def own_words(stderr: str) -> str:
    """Return a process's standard error, without PyTorch's log of other packages' calls."""
    return re.sub(r"^W\d{4} .*\btorch/.*\n", "", stderr, flags=re.MULTILINE)
