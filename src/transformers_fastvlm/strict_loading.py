# SPDX-License-Identifier: Apache-2.0
"""Strict loading: errors where Transformers only warns, for tensors that are missing, unknown or not weights.

A tensor without a value in any file is an error, for whole models and encoders, quantized or not: random values would
silently give wrong answers. The checks of the files are those of `checkpoints.convert`.
"""

import copy
import os
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from .checkpoint_files import BLOCK, Stored, read_tensors, refuse_integers, refuse_two_values
from .configuration_checks import check_directory
from .tensor_names import to_our_name

__all__ = ["StrictPreTrainedModel", "for_language_model_alone"]

_ADVICE = (
    "Its config.json does not match its weights, or a shard is missing. Compare the two, or download the checkpoint "
    "again."
)
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
# Transformers replaces methods of its classes while loading and restores them afterwards. With two threads at once, the
# second would restore the first one's replacements.
_LOADING = threading.RLock()
_TIED = {"lm_head.weight", "model.language_model.embed_tokens.weight"}
_BATCHES_SEEN = ".num_batches_tracked"  # Apple's encoders were trained with it; evaluation does not use it


class StrictPreTrainedModel(PreTrainedModel):
    """A model of Transformers whose `from_pretrained` refuses incomplete checkpoints."""

    # Prefixes of tensors that a checkpoint may lack; they are initialised as in a new model.
    _may_be_missing: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a model. See `PreTrainedModel.from_pretrained`. Threads that load in parallel wait for each other.

        Raises:
            OSError: a file is missing, truncated or not safetensors.
            ValueError: config.json is invalid, or the checkpoint has unknown tensors, lacks required ones, has two
                values for one tensor, or holds integers instead of weights.
        """
        source = pretrained_model_name_or_path
        if source is not None and os.path.isdir(source):
            check_directory(os.path.join(source, kwargs.get("subfolder") or ""))
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            with _LOADING:
                model, info = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"A weight file of {str(source)!r} cannot be read ({error}). It is truncated or damaged: "
                "download or copy it again."
            ) from error
        if source is not None and hasattr(model, "peft_config") and info["missing_keys"]:
            # The missing keys are the adapter's: its tensors would be initialised as if it had not been trained.
            raise ValueError(_message(f"The adapter in {source}", "no values for its tensors", info["missing_keys"]))
        return (model, info) if wants_info else model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if state_dict is None:
            packed = load_config.hf_quantizer is not None and load_config.hf_quantizer.pre_quantized
            _check_files(model, checkpoint_files or (), packed)
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if loaded[0].mismatched_keys and not load_config.ignore_mismatched_sizes:
            shapes = [f"{name} {tuple(a)}, expected {tuple(b)}" for name, a, b in sorted(loaded[0].mismatched_keys)]
            raise ValueError(_message(_of(load_config), "tensors of other shapes than config.json says", shapes, "; "))
        return loaded

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        given = load_config.pretrained_model_name_or_path is not None  # else a new model, or one with a state_dict
        if given:
            _refuse_missing(model, load_config, set(loading_info.missing_keys))
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if given and loading_info.unexpected_keys:
            unknown = loading_info.unexpected_keys
            raise ValueError(_message(_of(load_config), "tensors that this model does not know", unknown))
        return loading_info


def _refuse_missing(model: StrictPreTrainedModel, load_config: Any, missing: set[str]) -> None:
    """Raise ValueError if a tensor has no value; call it before missing tensors are initialised, which may fail."""
    names = (name for name in model.state_dict() if not name.endswith(_BATCHES_SEEN))
    needed = {name for name in names if not name.startswith(model._may_be_missing)}
    missing &= needed
    quantizer = load_config.hf_quantizer
    if quantizer is not None and not quantizer.pre_quantized:
        missing &= _names_before_quantization(model)
    if missing >= needed:
        raise ValueError(
            _message(_of(load_config), "no tensor of this model and belongs to another one; missing", missing)
        )
    if len(missing & _TIED) == 1:
        missing -= _TIED  # each can replace the other
    if missing:
        raise ValueError(_message(_of(load_config), "no values for tensors that this model needs", missing))


def for_language_model_alone(quantization_config: Any) -> Any:
    """Return a quantization configuration that excludes encoder, projector and head unless it lists exclusions."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    fields = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules")  # by method
    field = next((name for name in fields if hasattr(quantization_config, name)), None)
    if field is None or getattr(quantization_config, field) is not None:
        return quantization_config
    kept = [prefix + part for part in ("vision_tower", "multi_modal_projector") for prefix in ("model.", "")]
    quantization_config = copy.copy(quantization_config)
    setattr(quantization_config, field, [*kept, "lm_head"])
    return quantization_config


def _names_before_quantization(model: PreTrainedModel) -> set[str]:
    """Return the names of a model's tensors without those that a quantizer adds and computes."""
    with torch.device("meta"):
        return set(type(model)(model.config).state_dict())


def _check_files(model: PreTrainedModel, files: Iterable[str], packed: bool) -> None:
    """Refuse files that hold integers instead of weights, or two values for one tensor."""
    own = set(model.state_dict())
    found: dict[str, list[Stored]] = {}
    for file in files:
        tensors: Mapping[str, Stored] = {}
        if file.endswith(".safetensors"):
            try:
                tensors = read_tensors(Path(file))
            except ValueError as error:
                raise OSError(str(error)) from error
        elif file.endswith(".bin"):
            tensors = _read_pickled(Path(file))
        for name, tensor in tensors.items():
            known = next((n for n in _candidates(name) if n in own), None)
            if known is not None:
                found.setdefault(known, []).append(tensor)
    refuse_two_values(found)
    if not packed:
        refuse_integers({name: tensors[0] for name, tensors in found.items()})


@dataclass(frozen=True)
class _PickledTensor:
    """A tensor in a PyTorch file, in the form that `checkpoint_files` checks."""

    file: Path
    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        """Name as in safetensors files."""
        is_plain = self.tensor.layout == torch.strided and not self.tensor.is_quantized
        return _NAMES.get(self.tensor.dtype, str(self.tensor.dtype)) if is_plain else "of a packed tensor"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def blocks(self) -> Iterator[bytes]:
        """Yield the values as bytes."""
        if self.dtype in _NAMES.values():
            for part in self.tensor.reshape(-1).split(BLOCK // self.tensor.element_size()):
                yield part.contiguous().view(torch.uint8).numpy().tobytes()


def _read_pickled(file: Path) -> dict[str, Stored]:
    """Return the tensors of a `torch.save` file by name; no code in it is executed.

    Raises:
        OSError: it holds more than tensors, or is damaged.
    """
    options = {"mmap": True} if zipfile.is_zipfile(file) else {}  # an older format cannot be mapped
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # unpickling may raise any error
        raise OSError(
            f"{file} cannot be read as weights ({type(error).__name__}). It is damaged, or holds more than tensors. "
            "Save the model as safetensors."
        ) from error
    if not isinstance(content, Mapping):
        raise OSError(f"{file} holds a {type(content).__name__}; expected tensors by name.")
    return {
        name: _PickledTensor(file, tensor)
        for name, tensor in content.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }


def _candidates(name: str) -> tuple[str, ...]:
    """Return the possible names of a checkpoint's tensor in a whole model, a model without a head, or an encoder."""
    ours = to_our_name(name) or name
    inner = ours.removeprefix("model.")
    return ours, inner, inner.removeprefix("vision_tower.")


def _of(load_config: Any) -> str:
    return f"The checkpoint {load_config.pretrained_model_name_or_path}"


def _message(whose: str, what: str, names: Iterable[str], separator: str = ", ") -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return f"{whose} has {what}: {separator.join(listed[:8])}{more}. {_ADVICE}"
