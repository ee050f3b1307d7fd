# SPDX-License-Identifier: Apache-2.0
"""The model that comes with the package, and the name that stands for it."""

import os
from pathlib import Path

__all__ = ["TINY", "resolve_model", "tiny_checkpoint"]

TINY = "tiny"
"""Name of the embedded model, wherever the package takes a directory or a hub repository."""


def resolve_model(model: str | os.PathLike[str]) -> str:
    """Return the directory or hub repository that a model's name means.

    `TINY` means the embedded model, unless the current directory has a directory `tiny`: a local directory always
    comes first, as in `from_pretrained`. Every other name is returned as it is. Every loader of the package calls this
    before it looks at the disk or asks the hub.
    """
    name = os.fspath(model)
    return str(tiny_checkpoint()) if name == TINY and not os.path.isdir(name) else name


def tiny_checkpoint() -> Path:
    """Return the directory of the embedded tiny FastVLM, laid out as Apple's checkpoints.

    It has 3.8 million parameters and was trained from nothing, by this package's own recipes, to answer questions
    about drawn scenes: colours, shapes and where they are, counts, printed numbers and words, and bar charts. It is
    for trying things out without a network and for tests; about photographs it knows nothing. Its weights are under
    this package's licence, not Apple's.

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
