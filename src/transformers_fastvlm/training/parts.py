# SPDX-License-Identifier: Apache-2.0
"""The three parts of a FastVLM for training: which are trained, their learning rates and their sizes.

Parameters are identified by name: sharding changes shapes, while names only get prefixes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

__all__ = ["PARTS", "check_parts", "decays", "describe_parts", "parameter_groups", "part_of", "set_trainable"]

PARTS = ("vision_tower", "projector", "language_model")
"""The encoder, the two-layer projector (with the newline embedding of AnyRes), the language model (with its head)."""

_PART_OF_COMPONENT = {
    "vision_tower": "vision_tower",
    "multi_modal_projector": "projector",
    "image_newline": "projector",
    "language_model": "language_model",
    "lm_head": "language_model",
}
_NO_DECAY = re.compile(r"(^|[._])(bias|bn|norm\w*|\w*norm|layer_scale\w*|rbr_skip|image_newline)(\.|$)")


def part_of(name: str) -> str:
    """Return the part, one of `PARTS`, that a parameter belongs to.

    Args:
        name: a name of `model.named_parameters()`; it may have prefixes of wrappers such as PEFT's or DDP's.

    Raises:
        ValueError: the name does not belong to a part of a FastVLM.
    """
    for component in name.split("."):
        if component in _PART_OF_COMPONENT:
            return _PART_OF_COMPONENT[component]
    raise ValueError(f"The parameter {name!r} belongs to none of {', '.join(PARTS)}; is this model a FastVLM?")


def decays(name: str) -> bool:
    """Return whether weight decay applies to a parameter: not to biases, norms, layer scales and AnyRes's newline."""
    return _NO_DECAY.search(name) is None


def set_trainable(model: nn.Module, parts: Iterable[str]) -> None:
    """Make the named parts trainable and freeze the others.

    The encoder's CLIP head always stays frozen: a FastVLM does not use its embedding, so it would never get a gradient.

    Args:
        model: a FastVLM.
        parts: some of `PARTS`; an empty list freezes everything.

    Raises:
        ValueError: a name is not a part.
    """
    wanted = check_parts(parts)
    for name, parameter in model.named_parameters():
        is_clip_head = ".vision_tower.head." in f".{name}"
        parameter.requires_grad_(part_of(name) in wanted and not is_clip_head)


def parameter_groups(
    model: nn.Module, lr_by_part: Mapping[str, float] | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups for a PyTorch optimizer.

    Args:
        model: a FastVLM, wrapped or not.
        lr_by_part: learning rate of each trainable part; None uses the optimizer's.
        weight_decay: weight decay of the parameters that `decays` selects; 0 for the others.

    Returns:
        For each trainable part a group with weight decay and a group without, except empty groups, with `params`,
        `weight_decay`, `part` and, if rates are given, `lr`.

    Raises:
        ValueError: a name is not a part, or a trainable part has no learning rate.
    """
    rates = dict(lr_by_part or {})
    check_parts(rates)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decay = part_of(name), decays(name)
        if lr_by_part is not None and part not in rates:
            raise ValueError(
                f"{part} is trainable, but has no learning rate: there is one for {', '.join(rates) or 'no part'}. Add "
                "one, or freeze the part."
            )
        group = groups.setdefault(
            (part, decay), {"params": [], "weight_decay": weight_decay if decay else 0.0, "part": part}
        )
        if lr_by_part is not None:
            group["lr"] = rates[part]
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (PARTS.index(key[0]), not key[1]))]


def describe_parts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (parameters, trainable parameters) of each part; a tensor that two modules share counts once."""
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        # DeepSpeed's ZeRO-3 empties the tensor and stores its size in an attribute.
        number = getattr(parameter, "ds_numel", parameter.numel())
        total, trainable = counts[part_of(name)]
        counts[part_of(name)] = (total + number, trainable + number * parameter.requires_grad)
    return counts


def check_parts(parts: Iterable[str]) -> set[str]:
    """Return the names of parts; raise ValueError for a name that is not in `PARTS`."""
    wanted = {parts} if isinstance(parts, str) else set(parts)
    if unknown := wanted - set(PARTS):
        raise ValueError(
            f"There is no part {', '.join(map(repr, sorted(unknown)))}; expected some of {', '.join(PARTS)}."
        )
    return wanted
