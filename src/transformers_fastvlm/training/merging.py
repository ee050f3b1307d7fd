# SPDX-License-Identifier: Apache-2.0
"""Merging of adapters into the weights: this package's, peft's, and those of LoRA training in LLaVA code."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from .. import FastVLMForConditionalGeneration, FastVLMProcessor
from ..checkpoint_files import read_json
from ..checkpoints import Conversion, Layout, convert
from ..checkpoints.adapters import ADAPTER_CONFIG, LLAVA_FILE
from ..checkpoints.embedded import resolve_model
from ..checkpoints.layouts import to_our_name
from ..checkpoints.projector import load_tensors
from ..storage.atomic_files import require_new
from .lora import add_lora, attach, merge, require

__all__ = ["load_llava_adapter", "load_merged", "merge_adapter"]

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LICENCE = "LICENSE"

_IF_THERE: dict[str, Any] = {
    f"_raise_exceptions_for_{reason}": False for reason in ("missing_entries", "gated_repo", "connection_errors")
}

Source = str | os.PathLike[str]


def merge_adapter(
    adapter: Source,
    out: Source,
    *,
    base: Source | None = None,
    layout: Layout = "apple",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Conversion:
    """Merge an adapter into its base and write the model, with its processor, to the new directory `out`.

    Each sum is computed in float32 and rounded once, to the dtype of the base's weights.

    Args:
        adapter: directory of an adapter, of peft or of LLaVA code; or a hub repository with a peft adapter.
        out: a directory that does not exist yet, or is empty. It appears when it is complete.
        base: directory or hub repository of the model that the adapter was trained on, or "tiny"; by default the base
            in the adapter's configuration. An adapter that was trained on four bits is merged into the full weights.
        layout: "apple", "transformers" or "native", as for `checkpoints.convert`.
        dtype: dtype of the weights; by default the base's.
        progress: as for `checkpoints.convert`, while the merged weights are written.

    Returns:
        The result of `checkpoints.convert`.

    Raises:
        FileExistsError: `out` exists and is not an empty directory.
        ImportError: peft is not installed.
        OSError: the adapter or its base cannot be found or read.
        ValueError: adapter and base do not match, or `layout` cannot express the model.
    """
    out = Path(out)
    require_new(out)
    adapter, config = _find(adapter)
    source, revision = _base(adapter, config, base)
    model = load_merged(adapter, source, dtype=dtype, revision=revision)
    # A run saves its processor with the adapter, and it may have trained at another resolution.
    if (adapter / "processor_config.json").is_file():
        processor = FastVLMProcessor.from_pretrained(adapter)
        vision: Any = model.config.vision_config
        vision.image_size = processor.image_processor.size["height"]
    else:
        processor = FastVLMProcessor.from_pretrained(source, revision=revision)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.incomplete-", dir=out.parent) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if licence := cached_file(str(source), LICENCE, revision=revision, **_IF_THERE):
            shutil.copyfile(licence, Path(folder) / LICENCE)
        return convert(folder, out, layout, progress=progress)


def load_merged(
    adapter: Source,
    base: "Source | FastVLMForConditionalGeneration | None" = None,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> FastVLMForConditionalGeneration:
    """Merge an adapter into its base and return the model, on the CPU and in evaluation mode.

    Args:
        adapter, dtype: see `merge_adapter`.
        base: as in `merge_adapter`, or a loaded model, which is changed and returned.
        revision: revision of the base, if it is a hub repository.

    Raises:
        ImportError, OSError, ValueError: see `merge_adapter`.
    """
    adapter, config = _find(adapter)
    if isinstance(base, FastVLMForConditionalGeneration):
        model = base
    else:
        source, named = _base(adapter, config, base)
        model = FastVLMForConditionalGeneration.from_pretrained(source, dtype="auto", revision=revision or named)
    model = load_llava_adapter(adapter, model) if _is_llavas(adapter) else merge(attach(model, adapter))
    return model.to(dtype or model.dtype).eval()


def load_llava_adapter(directory: Source, model: FastVLMForConditionalGeneration) -> FastVLMForConditionalGeneration:
    """Merge the result of LoRA training in LLaVA code into a model, and return the model.

    The result is a directory with peft's `adapter_config.json` and `adapter_model`, with Apple's layer names, and
    `non_lora_trainables.bin`: the projector and other fully trained parts.

    Args:
        directory: directory of the adapter. Pickled files are read as data only: code in them does not run.
        model: the base model; it is changed.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: peft is not installed.
        ValueError: a file is damaged, or the model lacks a tensor or has it in another shape.
    """
    directory, content = _find(directory)
    tensors = dict(load_tensors(_weight_file(directory)))
    if (directory / LLAVA_FILE).is_file():
        tensors |= load_tensors(directory / LLAVA_FILE)
    layers, others = _in_our_names(directory, tensors)

    peft = require("peft")
    config = peft.LoraConfig.from_pretrained(directory)
    # Short layer names, such as q_proj, could also match the encoder's layers.
    config.target_modules = sorted({name.partition(".lora_")[0] for name in layers})
    config.exclude_modules = config.layers_to_transform = config.modules_to_save = None
    for patterns in (config.rank_pattern, config.alpha_pattern):
        for name in list(patterns):  # peft matches them against the end of a name
            patterns[name.removeprefix("model.")] = patterns.pop(name)
    config.inference_mode = True
    unknown = set(others) - set(model.state_dict())
    lacking = set(config.target_modules) - {name for name, _ in model.named_modules()}
    if unknown or lacking:
        raise ValueError(f"{directory} has tensors for layers that this model lacks: {min(unknown | lacking)}.")
    try:
        model.load_state_dict(others, strict=False)
        wrapped = add_lora(model, config)
        prefixed = {f"base_model.model.{name}": tensor for name, tensor in layers.items()}
        result = peft.set_peft_model_state_dict(wrapped, prefixed)
    except RuntimeError as error:
        raise ValueError(f"{directory} does not fit the model: {' '.join(str(error).split())[:300]}") from error
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if missing or result.unexpected_keys:
        wrong = (missing or result.unexpected_keys)[0]
        raise ValueError(
            f"{directory} is {'incomplete' if missing else 'of another kind'}: {wrong} "
            f"{'is missing' if missing else 'is not known'} (r is {content.get('r')} in {ADAPTER_CONFIG})."
        )
    merged: FastVLMForConditionalGeneration = merge(wrapped)
    return merged


def _is_llavas(directory: Path) -> bool:
    """Return whether an adapter was trained with LLaVA code or Apple's remote code, by its tensor names."""
    if (directory / LLAVA_FILE).is_file():
        return True
    stored = [_plain(name) for name in load_tensors(_weight_file(directory))]
    return any(to_our_name(name) not in (name, None) for name in stored)


def _weight_file(directory: Path) -> Path:
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"{directory} has neither {' nor '.join(WEIGHT_FILES)}; the adapter is incomplete.")


def _plain(stored: str) -> str:
    """Return the name of a tensor without peft's additions."""
    return stored.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _in_our_names(directory: Path, tensors: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the adapter's tensors and all others, under our names."""
    layers: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for stored, tensor in tensors.items():
        renamed = to_our_name(_plain(stored))
        if renamed is None:
            raise ValueError(f"{directory} has the tensor {stored}, which is not part of an adapter for FastVLM.")
        (layers if ".lora_" in renamed else others)[renamed] = tensor
    if not layers:
        raise ValueError(f"{directory} has no adapter tensors (lora_A, lora_B).")
    return layers, others


def _find(adapter: Source) -> tuple[Path, dict[str, Any]]:
    """Return the directory of an adapter, downloaded from the hub if it is not local, and its configuration."""
    directory = Path(adapter)
    if not directory.is_dir():
        if directory.exists() or len(directory.parts) != 2 or directory.is_absolute():
            raise FileNotFoundError(f"{adapter} is not a directory; expected one with {ADAPTER_CONFIG}.")
        from huggingface_hub import snapshot_download

        directory = Path(
            snapshot_download(str(adapter), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])
        )
    if not (directory / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{directory} has no {ADAPTER_CONFIG}; expected the directory of an adapter.")
    config = read_json(directory / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{directory} holds an adapter of type {config.get('peft_type')!r}; expected 'LORA'.")
    return directory, config


def _base(adapter: Path, config: dict[str, Any], base: Source | None) -> tuple[Source, str | None]:
    """Return the base model and, if it is on the hub, its revision."""
    if base is not None:
        return resolve_model(base), None
    named = config.get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{adapter / ADAPTER_CONFIG} does not name the base model; pass it as base (--base).")
    named = resolve_model(named)
    return named, None if os.path.isdir(named) else config.get("revision")
