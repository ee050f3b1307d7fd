# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in peft's format: finding their base model, attaching them, and merging them into the weights."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._optional import needs
from ..checkpoint_files import read_json
from .embedded import resolve_model

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

__all__ = ["ADAPTER_CONFIG", "LLAVA_FILE", "OLD_NAME", "attach", "base_of_adapter", "merge"]

ADAPTER_CONFIG = "adapter_config.json"
OLD_NAME = "`is_gradient_checkpointing`"
"""peft reads this property of a model; Transformers 5.23 renamed it and warns."""

LLAVA_FILE = "non_lora_trainables.bin"


def base_of_adapter(source: str | os.PathLike[str]) -> str | None:
    """Return the base model of an adapter's directory, a directory or hub repository; None for any other source.

    Raises:
        ValueError: the adapter names no base or a base that does not exist, or comes from LLaVA code and must be merged
            first.
    """
    folder = Path(source)
    if (folder / "config.json").is_file() or not (folder / ADAPTER_CONFIG).is_file():
        return None
    merge_first = f"Merge it once: fastvlm merge {folder} OUT --base BASE."
    if (folder / LLAVA_FILE).is_file():
        raise ValueError(f"{folder} is an adapter of LLaVA code ({LLAVA_FILE}). {merge_first}")
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder} is an adapter, but its {ADAPTER_CONFIG} names no base model. {merge_first}")
    base = resolve_model(base)
    if not os.path.isdir(base) and (os.path.isabs(base) or len(Path(base).parts) != 2):
        raise ValueError(f"{folder} is an adapter, but its base model {base!r} does not exist. {merge_first}")
    return base


def attach(model: "nn.Module", directory: str | os.PathLike[str]) -> "PeftModel":
    """Return a model with the adapters of a directory, frozen.

    Raises:
        ValueError: the adapters do not match the model; peft would only warn about missing tensors.
    """
    with needs("peft", "An adapter", 'pip install "transformers-fastvlm[training]"'):
        import peft
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", OLD_NAME, FutureWarning)
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            wrapped: PeftModel = peft.PeftModel.from_pretrained(model, directory)
        except (RuntimeError, UserWarning) as error:
            raise ValueError(
                f"The adapter in {directory} does not fit its base model: {' '.join(str(error).split())[:300]}"
            ) from error
    return wrapped


def merge(wrapped: "PeftModel") -> Any:
    """Merge the adapters into the weights, in place, and return the model without peft's wrapper.

    Each sum is computed in float32 and rounded once, to the dtype of the weights, one layer at a time.

    Raises:
        ValueError: the weights are quantized, or a sum is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in wrapped.named_modules():
        if not isinstance(module, BaseTunerLayer) or not hasattr(module, "base_layer"):
            continue
        base: Any = module.get_base_layer()
        if not base.weight.is_floating_point():
            raise ValueError(
                f"{name} is quantized ({base.weight.dtype}); adapters can only be merged into full weights. Save the "
                "adapter and merge it with its base: merge_adapter, or fastvlm merge."
            )
        dtype = base.weight.dtype
        base.float()
        module.merge(safe_merge=True)
        base.to(dtype)
    return wrapped.unload()
