# SPDX-License-Identifier: Apache-2.0
"""tiny, the test model that ships with the package, and the resolution of its name."""

import os
from pathlib import Path

__all__ = ["TINY", "resolve_model", "tiny_checkpoint"]

TINY = "tiny"
"""Name of the embedded model, accepted wherever the package takes a directory or a hub repository."""


def resolve_model(model: str | os.PathLike[str]) -> str:
    """Return the directory or hub repository of a model's name.

    `TINY` is the embedded model, unless the current directory has a directory `tiny`: a local directory always comes
    first, as in `from_pretrained`. Other names are returned unchanged. Every loader of the package calls this before it
    accesses the disk or the hub.
    """
    name = os.fspath(model)
    return str(tiny_checkpoint()) if name == TINY and not os.path.isdir(name) else name


def tiny_checkpoint() -> Path:
    """Return the directory of the embedded tiny FastVLM, laid out as Apple's checkpoints.

    It has 3.8 million parameters and was trained from scratch with this package's recipes, to answer questions about
    drawn scenes: colours, shapes and their positions, counts, printed numbers and words, and bar charts. It is meant
    for offline experiments and tests and cannot describe photographs. Its weights are under this package's licence, not
    Apple's.

    Raises:
        FileNotFoundError: the package was installed without its data files.

    Example:
        >>> from transformers import AutoModelForImageTextToText
        >>> model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint())
    """
    directory = Path(__file__).parent.parent / "tiny"
    if not (directory / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{directory} has no model.safetensors: the package was installed without its data. Install it again."
        )
    return directory
