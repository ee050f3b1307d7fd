# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint directory of any layout: tensors under our names, a `FastVLMConfig`, and checks of both."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..checkpoint_files import (
    StoredTensor,
    read_directory,
    read_json,
    read_tensors,
    refuse_integers,
    same_values,
)
from ..configuration_fastvlm import FastVLMConfig, is_flat
from .configs import config_from_native, native_vocabulary
from .embedded import resolve_model
from .layouts import is_dropped, to_our_name
from .native import EXTRA_FILE, from_native_name

__all__ = ["Checkpoint", "Layout", "detect_layout", "read_checkpoint"]

Layout = Literal["apple", "transformers", "native"]

_MODEL_TYPES: dict[str, Layout] = {"fastvlm": "transformers", "fast_vlm": "native"}
_EMBEDDING = "model.language_model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_CLIP_HEAD = "model.vision_tower.head.proj"
_TRAIN_TIME_PARTS = (".rbr_conv.", ".rbr_skip.", ".lkb_origin.", ".pe.")


@dataclass
class Checkpoint:
    """A checkpoint that has been read, except for the tensors' values.

    Attributes:
        directory, layout, raw_config: its directory, its layout, and the content of its config.json.
        config: the model's configuration, corrected where the tensors contradict config.json.
        tensors: all tensors by our name.
        shards: our names, grouped by source file.
        dropped: source names of tensors left out on purpose.
        notes: remarks for the user.
    """

    directory: Path
    layout: Layout
    raw_config: dict[str, Any]
    config: FastVLMConfig
    tensors: dict[str, StoredTensor]
    shards: list[list[str]]
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def vocabulary(self) -> int:
        """Rows of the vocabulary."""
        text: Any = self.config.text_config
        return int(text.vocab_size)

    def resize_vocabulary(self, rows: int) -> None:
        """Cut the embeddings and the head to `rows` rows, or extend them with copies of their first row."""
        text: Any = self.config.text_config
        text.vocab_size = rows
        for name in (_EMBEDDING, _HEAD):
            if name in self.tensors:
                self.tensors[name] = self.tensors[name].with_rows(rows)


def detect_layout(directory: str | os.PathLike[str]) -> Layout:
    """Return the layout that a directory's config.json declares.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: the config.json is of another model.
    """
    path = Path(resolve_model(directory)) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no config.json; expected the directory of a FastVLM checkpoint.")
    config = read_json(path)
    if is_flat(config):
        return "apple"
    model_type = config.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ValueError(
            f"{path} has model_type {model_type!r}; expected llava_qwen2 or llava_llama (Apple's layout), fastvlm "
            "(this package's) or fast_vlm (Transformers' own port)."
        )
    return _MODEL_TYPES[model_type]


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint of any layout and check its tensors' names and shapes; their values stay on disk.

    Where config.json is known to be unreliable, the tensors decide: whether the head is tied, whether the encoder is
    merged, and whether it has the CLIP head.

    Raises:
        FileNotFoundError: config.json, the weights or a shard is missing.
        ValueError: a file is damaged, tensors are unknown, repeated or missing, or shapes contradict config.json.
    """
    layout = detect_layout(directory)
    raw = read_json(directory / "config.json")
    notes: list[str] = []
    if layout == "native":
        config, notes = config_from_native(directory)
    else:
        config = FastVLMConfig.from_pretrained(directory)
    stored = read_directory(directory)
    if layout == "native" and (directory / EXTRA_FILE).is_file():
        stored |= read_tensors(directory / EXTRA_FILE)

    to_ours = from_native_name if layout == "native" else to_our_name
    dropped = [name for name in stored if is_dropped(name)]
    names = {name: to_ours(name) for name in stored if not is_dropped(name)}
    _refuse_unknown(directory, [name for name, ours in names.items() if ours is None])
    tensors = {ours: stored[name] for name, ours in names.items() if ours is not None}
    refuse_integers(tensors)
    if len(tensors) != len(names):
        twice = sorted(name for name, ours in names.items() if name != ours and ours in names)
        raise ValueError(f"{directory} holds tensors under Apple's names and under ours: {', '.join(twice[:10])}.")
    files: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        files.setdefault(tensor.file, []).append(name)
    extra = files.pop(directory / EXTRA_FILE, [])
    shards = list(files.values())
    shards[0].extend(extra)
    checkpoint = Checkpoint(directory, layout, raw, config, tensors, shards, dropped, notes)
    _correct_config(checkpoint)
    _check_tensors(checkpoint)
    return checkpoint


def _refuse_unknown(directory: Path, unknown: list[str]) -> None:
    if unknown:
        shown = ", ".join(sorted(unknown)[:20]) + (", …" if len(unknown) > 20 else "")
        raise ValueError(
            f"{directory} holds {len(unknown)} tensors that FastVLM does not have: {shown}. They would be lost, so "
            "nothing is converted: merge adapters and restore quantized weights first."
        )


def _correct_config(checkpoint: Checkpoint) -> None:
    """Correct the configuration where config.json is incomplete or unreliable, by the tensors."""
    tensors, config, raw = checkpoint.tensors, checkpoint.config, checkpoint.raw_config
    vision: Any = config.vision_config
    text: Any = config.text_config
    vision.reparameterized = not any(part in name for name in tensors for part in _TRAIN_TIME_PARTS)
    vision.projection_dim = tensors[_CLIP_HEAD].shape[-1] if _CLIP_HEAD in tensors else 0
    if _EMBEDDING in tensors:
        # An untied model whose head happens to equal its embeddings stays untied.
        equal = _HEAD not in tensors or same_values(tensors[_EMBEDDING], tensors[_HEAD])
        tied = equal and (config.tie_word_embeddings or _HEAD not in tensors)
        if tied != config.tie_word_embeddings:
            checkpoint.notes.append(
                f"config.json has tie_word_embeddings {config.tie_word_embeddings}, but the tensors say {tied}"
            )
            config.tie_word_embeddings = raw["tie_word_embeddings"] = tied
            if "tie_word_embeddings" in raw.get("text_config", {}):
                raw["text_config"]["tie_word_embeddings"] = tied
        text.tie_word_embeddings = config.tie_word_embeddings
    if checkpoint.layout == "native":
        rows = native_vocabulary(raw)
        if rows is not None and rows < checkpoint.vocabulary:
            checkpoint.resize_vocabulary(rows)


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Compare all names and shapes with the model that the configuration describes."""
    import torch

    from ..modeling_fastvlm import FastVLMForConditionalGeneration

    tensors, directory = checkpoint.tensors, checkpoint.directory
    with torch.device("meta"):
        model = FastVLMForConditionalGeneration(checkpoint.config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _refuse_unknown(directory, [name for name in tensors if name not in expected])
    optional = {_HEAD} if checkpoint.config.tie_word_embeddings else set()
    missing = [
        name
        for name in expected
        if name not in tensors and name not in optional and not name.endswith(".num_batches_tracked")
    ]
    if missing:
        raise ValueError(
            f"{directory} lacks {len(missing)} tensors of the model that its config.json describes: "
            f"{', '.join(missing[:10])}{', …' if len(missing) > 10 else ''}. It is incomplete, or has a wrong config."
        )
    wrong = [
        f"{name} {tensor.shape}, expected {expected[name]}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name]
    ]
    if wrong:
        raise ValueError(
            f"{directory} holds {len(wrong)} tensors whose shapes contradict config.json: "
            f"{'; '.join(wrong[:10])}{'; …' if len(wrong) > 10 else ''}."
        )
