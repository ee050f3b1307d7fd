# SPDX-License-Identifier: Apache-2.0
"""Names of tensors in Apple's checkpoints and in this package: one table, read in both directions.

All renaming is derived from `APPLE_TO_OURS`: Transformers applies it when loading and reverses it when saving, a model
applies it to a given state_dict, and the converter uses the functions below. Inside the encoder both sides use the same
names. Importing this module imports neither torch nor Transformers.
"""

from collections.abc import Iterable, MutableMapping
from typing import Any

__all__ = ["APPLE_TO_OURS", "rename_state", "to_apple_name", "to_our_name"]

APPLE_TO_OURS: tuple[tuple[str, str], ...] = (
    ("model.vision_tower.vision_tower.model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("model.image_newline", "model.image_newline"),
    ("lm_head.", "lm_head."),
)
"""Pairs (Apple's, ours). A name that ends in a dot is a prefix, any other a whole name. No prefix of one side is a
prefix of another of the same side, so the order does not matter."""


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name.removeprefix(old)
    return None


def to_our_name(name: str) -> str | None:
    """Return our name of a tensor with Apple's name or already ours; None if it is neither.

    Applying it twice changes nothing.
    """
    ours = _renamed(name, APPLE_TO_OURS)
    if ours is None and _renamed(name, ((new, old) for old, new in APPLE_TO_OURS)) is not None:
        return name
    return ours


def to_apple_name(name: str) -> str | None:
    """Return Apple's name of a tensor with our name or already Apple's; None if it is neither."""
    ours = to_our_name(name)
    return None if ours is None else _renamed(ours, ((new, old) for old, new in APPLE_TO_OURS))


def rename_state(state: MutableMapping[str, Any], prefix: str = "") -> None:
    """Rename tensors in a model's state from Apple's names to ours.

    Args:
        state: tensors by name; changed in place. Other names are kept.
        prefix: prefix of the model's names, if it is part of a larger module.
    """
    for name in list(state):
        ours = to_our_name(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if ours is not None and prefix + ours != name:
            state[prefix + ours] = state.pop(name)
