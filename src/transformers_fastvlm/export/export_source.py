# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that is exported: loaded when it is needed, only read, and whose licence it is under."""

import functools
import os
from pathlib import Path
from typing import Any

import torch

from .. import FastViTHDConfig, FastVLMConfig, FastVLMForConditionalGeneration, FastVLMProcessor
from ..checkpoints import Layout, detect_layout, licences, tiny_checkpoint
from ..checkpoints.embedded import resolve_model

__all__ = ["LICENCE_FILES", "RESEARCH_ONLY", "Source"]

RESEARCH_ONLY = f"Apple's weights are {licences.RESEARCH_ONLY}."
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "ACKNOWLEDGEMENTS*")


class Source:
    """A checkpoint directory.

    Args:
        directory: in Apple's layout or this package's; or "tiny".
        name: what the model is called in the card; by default the directory's name.

    Attributes:
        layout: "apple" or "transformers".

    Raises:
        FileNotFoundError: no such directory, or no config.json in it.
        ValueError: of another model, or of Transformers' own `fast_vlm`.
    """

    def __init__(self, directory: str | os.PathLike[str], name: str | None = None) -> None:
        self.directory = Path(resolve_model(directory))
        if not self.directory.is_dir():
            raise FileNotFoundError(f"{directory} is not a directory; expected one with a FastVLM checkpoint.")
        self.is_tiny = self.directory.resolve() == tiny_checkpoint().resolve()
        self.name = name or ("tiny" if self.is_tiny else self.directory.resolve().name)
        self.layout: Layout = detect_layout(self.directory)
        if self.layout == "native":
            raise ValueError(
                f"{directory} has the layout of Transformers' own fast_vlm. Convert it once: fastvlm convert "
                f"{directory} OUT --to apple."
            )

    @functools.cached_property
    def config(self) -> Any:
        """The model's `FastVLMConfig`."""
        return FastVLMConfig.from_pretrained(self.directory)

    @property
    def image_size(self) -> int:
        """The side, in pixels, of the images that the checkpoint was trained for."""
        return int(self.config.vision_config.image_size)

    @property
    def has_published_encoder(self) -> bool:
        """Whether the encoder has the published sizes."""
        found, published = self.config.vision_config, FastViTHDConfig()
        return all(
            list(getattr(found, name)) == list(getattr(published, name)) for name in ("depths", "hidden_sizes")
        ) and bool(found.mlp_ratio == published.mlp_ratio)

    @functools.cached_property
    def processor(self) -> FastVLMProcessor:
        """The model's processor, with the Pillow image processor."""
        return FastVLMProcessor.from_pretrained(self.directory)

    def model(self, dtype: torch.dtype | str = torch.float32) -> Any:
        """Load the model anew, on the CPU, in evaluation mode; the caller may do with it what it wants.

        Args:
            dtype: of the weights; "auto" is the checkpoint's own, and takes the least memory.
        """
        return FastVLMForConditionalGeneration.from_pretrained(self.directory, dtype=dtype).eval()

    @functools.cached_property
    def licence(self) -> str | None:
        """The weights' licence by its name on the hub, "apple-amlr" for Apple's; None if none is stated."""
        if self.is_tiny:
            return "apache-2.0"
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in self.licence_files()]
        card = self.directory / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
        return licences.stated_licence(self.name, texts, text)

    @property
    def may_be_apples(self) -> bool:
        """Whether the weights are Apple's, or could be: the published encoder's shape and no licence stated."""
        return licences.may_be_apples(self.licence, self.config.vision_config.hidden_sizes)

    def licence_files(self) -> list[Path]:
        """Return the checkpoint's licence and notice files."""
        return sorted(path for pattern in LICENCE_FILES for path in self.directory.glob(pattern) if path.is_file())
