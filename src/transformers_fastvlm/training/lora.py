# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA) with peft: which layers get them, a base model in four bits (QLoRA), and merging.

Sources: LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314, section 4 (adapters on all linear layers, NF4 with double
quantization).
"""

import importlib
import re
import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._optional import needs
from ..checkpoints.adapters import OLD_NAME, attach, merge
from .parts import PARTS, check_parts

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import BitsAndBytesConfig

__all__ = ["add_lora", "attach", "lora_config", "merge", "quantization_config", "require"]

_MODULES = {"vision_tower": "vision_tower", "projector": "multi_modal_projector", "language_model": "language_model"}


def lora_config(
    model: nn.Module,
    *,
    r: int = 64,
    alpha: float | None = None,
    dropout: float = 0.05,
    parts: Iterable[str] = ("language_model",),
    targets: Iterable[str] | str | None = None,
    whole: Iterable[str] = (),
    **options: Any,
) -> "LoraConfig":
    """Return the configuration of adapters for some parts of a model.

    Args:
        model: a FastVLM, which is read to find its layers and not changed.
        r: rank of the adapters.
        alpha: an adapter's output is scaled by alpha / r; None for 2 · r.
        dropout: dropout probability of an adapter's input during training.
        parts: the parts, of `PARTS`, whose layers get adapters. "language_model": all linear layers of the decoder
            (peft's "all-linear" would include the encoder's); "vision_tower": `qkv` and `proj` of the attention and
            the 1x1 convolutions `fc1` and `fc2` of the feed-forward networks; "projector": both layers.
        targets: names of layers, such as "q_proj", instead of all layers of the parts; a string is passed to peft
            unchanged, as a regular expression on full names.
        whole: parts that are fully trained together with the adapters and saved with them, each as a copy:
            "projector" (without AnyRes's newline, which is not trained) or "vision_tower".
        **options: further arguments of `peft.LoraConfig`, such as `use_rslora`.

    Raises:
        ImportError: peft is not installed.
        ValueError: a part or layer is unknown, a part is given twice, or BatchNorm is not frozen: its statistics change
            during training and are not part of an adapter.
    """
    LoraConfig = require("peft").LoraConfig
    parts, whole = _checked(parts, whole)
    moving = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats and not getattr(module, "frozen", False)
    ]
    if moving and "vision_tower" not in whole:
        raise ValueError(
            f"{len(moving)} BatchNorm layers of the encoder, such as {moving[0]}, would update their statistics, which "
            "an adapter does not hold. Merge the encoder's branches "
            "(model.model.vision_tower.eval().reparameterize()), or load the model with "
            "vision_config.freeze_batch_norm true."
        )
    if not isinstance(targets, str):
        targets = _pattern(model, parts, targets)
    options.setdefault("task_type", "CAUSAL_LM")
    return LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=[_MODULES[part] for part in whole] or None,
        **options,
    )


def add_lora(model: nn.Module, config: "LoraConfig | None" = None, **options: Any) -> "PeftModel":
    """Add adapters to a model, in place, and freeze everything else.

    It is `peft.get_peft_model`, but also keeps the encoder's CLIP head frozen where the encoder is fully trained: the
    head never gets a gradient, and distributed training would wait for one.

    Args:
        model: a FastVLM, quantized or not.
        config: configuration of the adapters; by default `lora_config(model, **options)`.

    Returns:
        The model in peft's wrapper, for `Trainer` and `SFTTrainer`.

    Raises:
        ImportError, ValueError: as for `lora_config`.
    """
    if config is not None and options:
        raise ValueError(f"config and {', '.join(options)} are both given; put the options into config.")
    peft = require("peft")
    config = lora_config(model, **options) if config is None else config
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", OLD_NAME, FutureWarning)
        wrapped: PeftModel = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if name.endswith(".head.proj") and ".vision_tower." in name:
            parameter.requires_grad_(False)
    return wrapped


def quantization_config(
    kind: str = "4bit", *, compute_dtype: torch.dtype = torch.bfloat16, **options: Any
) -> "BitsAndBytesConfig":
    """Return the configuration that quantizes the language model to four or eight bits while loading, for QLoRA.

    Encoder, projector and head keep the dtype of the model. Pass the result to `from_pretrained` together with `dtype`,
    which should be `compute_dtype`:

        model = FastVLMForConditionalGeneration.from_pretrained(
            "apple/FastVLM-7B", dtype=torch.bfloat16, quantization_config=quantization_config()
        )

    Args:
        kind: "4bit" (NF4 with double quantization) or "8bit".
        compute_dtype: dtype of the matrix multiplications with four-bit weights.
        **options: further arguments of `BitsAndBytesConfig`, such as `bnb_4bit_quant_storage` for FSDP.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: `kind` is neither of the two.
    """
    if kind not in ("4bit", "8bit"):
        raise ValueError(f"quantization is {kind!r}; expected '4bit' or '8bit'.")
    require("bitsandbytes", "pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind == "4bit":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute_dtype,
        }
    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    return BitsAndBytesConfig(llm_int8_skip_modules=kept, **settings, **options)


def _checked(parts: Iterable[str], whole: Iterable[str]) -> tuple[list[str], list[str]]:
    parts, whole = ([names] if isinstance(names, str) else list(names) for names in (parts, whole))
    check_parts([*parts, *whole])
    if not parts:
        raise ValueError(f"parts is empty, so no layer would get an adapter; expected some of {', '.join(PARTS)}.")
    if twice := set(parts) & set(whole):
        raise ValueError(f"{min(twice)} is in both parts and whole: give it adapters, or train it fully.")
    if "language_model" in whole:
        raise ValueError(
            "The language model cannot be fully trained together with adapters: its embeddings may be tied to the "
            "head, and peft's copy would not be. Give it adapters, or train without LoRA."
        )
    return parts, whole


def _pattern(model: nn.Module, parts: list[str], targets: Iterable[str] | None) -> str:
    """Return a regular expression on module names, which also matches other models of the same kind."""
    wanted = None if targets is None else set(targets)
    found: set[str] = set()
    patterns = []
    for part in parts:
        names = _linear_layers(model, part)
        if wanted is not None:
            names = {name for name in names if name.rpartition(".")[2] in wanted}
        found |= {name.rpartition(".")[2] for name in names}
        # The names of block and layer: `proj` alone would also match the encoder's downsampling.
        ends = {re.sub(r"\b\d+\b", r"\\d+", re.escape(".".join(name.split(".")[-2:]))) for name in names}
        if ends:
            patterns.append(rf"(?:.*\.)?{_MODULES[part]}\.(?:.*\.)?(?:{'|'.join(sorted(ends))})")
        elif wanted is None:
            raise ValueError(f"This model has no linear layers in its {part}, so it cannot get adapters.")
    if wanted is not None and wanted - found:
        known = sorted({name.rpartition(".")[2] for part in parts for name in _linear_layers(model, part)})
        raise ValueError(
            f"targets has {', '.join(map(repr, sorted(wanted - found)))}, which is no linear layer of "
            f"{' or '.join(parts)}; expected some of {', '.join(known)}."
        )
    return "|".join(patterns)


def _linear_layers(model: nn.Module, part: str) -> set[str]:
    """Return the names, within the part, of its linear layers and, in the encoder, of its 1x1 convolutions.

    The encoder's small gates (squeeze-excite), its stem and its downsampling are left out.
    """
    layers = set()
    for whole_name, module in model.named_modules():
        _, found, name = f".{whole_name}".partition(f".{_MODULES[part]}.")
        if not found:
            continue
        if isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and name.rpartition(".")[2] in ("fc1", "fc2") and module.groups == 1
        ):
            layers.add(name)
    return layers


def require(name: str, install: str = 'pip install "transformers-fastvlm[training]"') -> ModuleType:
    """Return an optional package.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    with needs(name, "Training", install):
        return importlib.import_module(name)
