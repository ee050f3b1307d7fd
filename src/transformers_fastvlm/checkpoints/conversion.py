# SPDX-License-Identifier: Apache-2.0
"""Conversion of a whole checkpoint directory between Apple's layout, ours and Transformers' native `fast_vlm`.

    directory ─ read ─► tensors under our names + FastVLMConfig ─ write ─► directory

Tensors are copied as bytes, so their bits and dtypes do not change. The target appears under its name only when it is
complete, and the source is never written to.
"""

import fnmatch
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..checkpoint_files import read_json
from ..storage.atomic_files import new_directory, require_new
from ..tokens import IMAGE_TOKEN, image_token_id_of
from .checkpoint_source import Checkpoint, Layout, read_checkpoint
from .configs import apple_config, native_config, native_processor_files
from .embedded import resolve_model
from .files import write_directory, write_json, write_tensors
from .layouts import to_apple_name, to_our_name
from .native import EXTRA_FILE, NOT_IN_NATIVE, to_native_name

__all__ = ["DROPPED_FILES", "DROPPED_FROM", "Conversion", "convert"]

_ANEW, _NOT_CONVERTED = "rewritten", "weights or training state, not converted"
DROPPED_FILES: dict[str, str] = {
    "config.json": _ANEW,
    "*.safetensors": _ANEW,
    "*.safetensors.index.json": _ANEW,
    **dict.fromkeys(("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack"), _NOT_CONVERTED),
    ".*": "hidden",
}
"""Patterns of file names that are never copied, each with the reason. Folders are not copied either."""

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_NATIVE_FILES = (*_PROCESSOR_FILES, "chat_template.jinja", "chat_template.json")
DROPPED_FROM: dict[Layout, dict[str, str]] = {
    "apple": {"*.py": "remote code of Apple's layout"},
    "transformers": dict.fromkeys(_PROCESSOR_FILES, "the processor of this package"),
    "native": dict.fromkeys(_NATIVE_FILES, "the processor of the native port"),
}
"""Further patterns, by the source's layout, if the target has another layout."""

_NATIVE_ROW_MULTIPLE = 64


@dataclass(frozen=True)
class Conversion:
    """The result of `convert`.

    Attributes:
        directory: directory of the result.
        source_layout, layout: the two layouts.
        num_tensors, num_bytes: number of tensors and bytes written.
        dropped: names of tensors left out on purpose (`layouts.DROPPED_TENSORS`).
        not_copied: files and folders of the source left out, each with the reason.
        notes: remarks for the user, such as values that the source did not state.
    """

    directory: Path
    source_layout: Layout
    layout: Layout
    num_tensors: int
    num_bytes: int
    dropped: tuple[str, ...] = ()
    not_copied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    layout: Layout = "apple",
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Conversion:
    """Write the checkpoint in `source` to the new directory `out`, laid out as `layout`.

    The source's layout is detected. Tensors keep their bits, dtypes and shards. Tokenizer, generation_config.json,
    licence and other small files are copied. The native layout also gets the files of its processor, `<image>` in the
    tokenizer, and `fastvlm_extra.safetensors` with the tensors that it does not support; converting back restores them.

    Args:
        source: directory of a checkpoint in safetensors, or "tiny".
        out: a directory that does not exist yet, or is empty.
        layout: "apple" (flat config.json, Apple's tensor names), "transformers" (this package's nested config.json and
            names) or "native" (`fast_vlm`, which Transformers loads without this package).
        progress: called with (bytes written so far, bytes in all, tensor name).

    Raises:
        FileNotFoundError: the source, its config.json, its weights or one of its shards is missing.
        FileExistsError: `out` exists and is not an empty directory.
        ValueError: a file is damaged, tensors are unknown or missing, shapes contradict config.json, it is another
            model, or `layout` cannot express the model.
    """
    source, out = Path(resolve_model(source)), Path(out)
    if layout not in get_args(Layout):
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(map(repr, get_args(Layout)))}.")
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a directory; expected one with a FastVLM checkpoint.")
    require_new(out)
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies inside the source {source}, which is never written to. Choose another directory.")
    checkpoint = read_checkpoint(source)
    with new_directory(out) as directory:
        return _write(checkpoint, directory, out, layout, progress)


def _write(
    checkpoint: Checkpoint,
    directory: Path,
    out: Path,
    layout: Layout,
    progress: Callable[[int, int, str], None] | None,
) -> Conversion:
    vocabulary = checkpoint.vocabulary
    not_copied = _copy_files(checkpoint, directory, layout)
    if layout == "native" != checkpoint.layout:
        _prepare_native(checkpoint, directory)
    tensors = checkpoint.tensors
    extra = {name: tensors[name] for name in tensors if name in NOT_IN_NATIVE} if layout == "native" else {}
    shards = [
        {_name_in(layout, name): tensors[name] for name in names if name not in extra} for names in checkpoint.shards
    ]
    total = sum(tensor.written_bytes for tensor in tensors.values())
    done = 0

    def advance(name: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total, name)

    write_directory(directory, shards, advance)
    if extra:
        write_tensors(directory / EXTRA_FILE, extra, advance)
    # Written last: without it, no loader accepts an incomplete directory.
    write_json(directory / "config.json", _config_in(layout, checkpoint, directory, vocabulary))
    return Conversion(
        directory=out,
        source_layout=checkpoint.layout,
        layout=layout,
        num_tensors=len(tensors),
        num_bytes=total,
        dropped=tuple(sorted(checkpoint.dropped)),
        not_copied=tuple(not_copied),
        notes=tuple(checkpoint.notes),
    )


def _name_in(layout: Layout, name: str) -> str:
    renamed = {"apple": to_apple_name, "transformers": to_our_name, "native": to_native_name}[layout](name)
    if renamed is None:
        raise ValueError(f"The tensor {name} has no name in the layout {layout!r}.")
    return renamed


def _config_in(layout: Layout, checkpoint: Checkpoint, directory: Path, vocabulary: int) -> dict[str, Any]:
    config = checkpoint.config
    if layout == checkpoint.layout:
        return checkpoint.raw_config
    if layout == "native":
        return native_config(config, vocabulary)
    if layout == "apple":
        flat = apple_config(config)
        if config.image_token_id is not None and image_token_id_of(directory) != config.image_token_id:
            flat["image_token_id"] = config.image_token_id
        return flat
    config.architectures = ["FastVLMForConditionalGeneration"]
    nested: dict[str, Any] = config.to_diff_dict()
    return nested


def _copy_files(checkpoint: Checkpoint, directory: Path, layout: Layout) -> list[str]:
    patterns = DROPPED_FILES | (DROPPED_FROM[checkpoint.layout] if layout != checkpoint.layout else {})
    not_copied = []
    for path in sorted(checkpoint.directory.iterdir()):
        reason = next((why for pattern, why in patterns.items() if fnmatch.fnmatch(path.name, pattern)), None)
        if path.is_dir():
            reason = "a folder"
        if reason is None:
            shutil.copyfile(path, directory / path.name)
        elif reason != _ANEW:
            not_copied.append(f"{path.name} ({reason})")
    return not_copied


def _prepare_native(checkpoint: Checkpoint, directory: Path) -> None:
    """Write the port's processor files, add `<image>` to the tokenizer and extend the vocabulary for it."""
    config = checkpoint.config
    for name, content in native_processor_files(config).items():
        write_json(directory / name, content)
    if config.mm_patch_merge_type != "flat" or config.image_aspect_ratio == "anyres":
        checkpoint.notes.append("the native port has no AnyRes: it sees each image as one padded square")
    token_id, rows = config.image_token_id, checkpoint.vocabulary
    if token_id is None:
        return
    _add_image_token(directory, token_id)
    if token_id >= rows:
        # The port embeds the placeholder before it replaces it by features. Rows that copy the first one are never the
        # first argmax.
        grown = -(-(token_id + 1) // _NATIVE_ROW_MULTIPLE) * _NATIVE_ROW_MULTIPLE
        checkpoint.resize_vocabulary(grown)
        checkpoint.notes.append(f"the vocabulary grew from {rows} to {grown} rows, to hold {IMAGE_TOKEN} ({token_id})")


def _add_image_token(directory: Path, token_id: int) -> None:
    """Add `<image>` to the copies of the tokenizer's files, wherever added tokens are listed."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    token: dict[str, Any] = {"content": IMAGE_TOKEN, **flags, "special": True}
    path = directory / "tokenizer_config.json"
    decoder: dict[str, Any] | None = None
    if path.is_file():
        content = read_json(path)
        decoder = content.get("added_tokens_decoder")
        if decoder is not None:
            decoder.setdefault(str(token_id), token)
            write_json(path, content)
    path = directory / "added_tokens.json"
    if path.is_file() or decoder is None:
        write_json(path, {IMAGE_TOKEN: token_id} | (read_json(path) if path.is_file() else {}))
    path = directory / "tokenizer.json"
    if path.is_file():
        content = read_json(path)
        added = content.setdefault("added_tokens", [])
        if all(entry["content"] != IMAGE_TOKEN for entry in added):
            added.append({"id": token_id} | token)
            write_json(path, content)
    found = image_token_id_of(directory)
    if found != token_id:
        raise ValueError(
            f"{IMAGE_TOKEN} should have the id {token_id} in the tokenizer, but has {found}: the tokenizer's files and "
            "config.json do not match."
        )
