# SPDX-License-Identifier: Apache-2.0
"""Names of tensors in Apple's checkpoints and in this package: one table, read in both directions.

Everything that renames is derived from `APPLE_TO_OURS`: the renamings that Transformers applies when it loads and
reverses when it saves, and the functions the converter uses. Inside the encoder both sides use the same names.
Importing this module imports neither torch nor Transformers.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightRenaming

__all__ = [
    "APPLE_TO_OURS",
    "DROPPED_TENSORS",
    "ENCODER_PREFIXES",
    "apple_weight_renamings",
    "encoder_weight_renamings",
    "is_dropped",
    "to_apple_name",
    "to_our_name",
]

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
"""Pairs (Apple's, ours). One that ends in a dot is a prefix, any other a whole name. No prefix of one side is a prefix
of another of the same side, so the order is of no consequence."""

DROPPED_TENSORS: dict[str, str] = {
    ".self_attn.rotary_emb.inv_freq": "rotary frequencies, stored by old Llama checkpoints; computed from rope_theta",
}
"""Ends of tensor names that a conversion leaves out, each with the reason."""

ENCODER_PREFIXES: tuple[str, ...] = ("model.vision_tower.vision_tower.model.", "model.vision_tower.", "vision_tower.")
"""What stands before the encoder's own names in a whole checkpoint: Apple's, ours, ours without a language head."""


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name.removeprefix(old)
    return None


def to_our_name(name: str) -> str | None:
    """Return our name of a tensor that carries Apple's name or already ours; None if it is neither.

    Applying it twice changes nothing.
    """
    ours = _renamed(name, APPLE_TO_OURS)
    if ours is None and _renamed(name, ((new, old) for old, new in APPLE_TO_OURS)) is not None:
        return name
    return ours


def to_apple_name(name: str) -> str | None:
    """Return Apple's name of a tensor that carries our name or already Apple's; None if it is neither."""
    ours = to_our_name(name)
    return None if ours is None else _renamed(ours, ((new, old) for old, new in APPLE_TO_OURS))


def is_dropped(name: str) -> bool:
    """Whether a conversion leaves this tensor out on purpose; see `DROPPED_TENSORS`."""
    return name.endswith(tuple(DROPPED_TENSORS))


def apple_weight_renamings() -> "list[WeightRenaming]":
    """Return what `register_checkpoint_conversion_mapping("fastvlm", …)` wants: Apple's names to ours.

    Transformers applies it while loading and reverses it while saving. Every pattern is anchored at the start, so
    names that are ours already, and an adapter's, pass unchanged.
    """
    from transformers.core_model_loading import WeightRenaming

    # Escaped dots on both sides: the target is the pattern when Transformers reverses the renaming.
    return [
        WeightRenaming("^" + apple.replace(".", r"\."), ours.replace(".", r"\."))
        for apple, ours in APPLE_TO_OURS
        if apple != ours
    ]


def encoder_weight_renamings() -> "list[WeightRenaming]":
    """Return what `register_checkpoint_conversion_mapping("fastvithd", …)` wants: an encoder out of a whole checkpoint.

    The prefix before the encoder's names is taken off, whichever of `ENCODER_PREFIXES` it is; names without one pass
    unchanged. What is not the encoder's keeps its name, and is unexpected to the encoder. As these are `PrefixChange`s,
    an encoder that was not loaded through them is saved under its own names.
    """
    from transformers.core_model_loading import PrefixChange

    return [PrefixChange(prefix_to_remove=prefix.removesuffix(".")) for prefix in ENCODER_PREFIXES]
