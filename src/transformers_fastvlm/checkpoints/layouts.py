# SPDX-License-Identifier: Apache-2.0
"""Renamings of tensors for Transformers, derived from `tensor_names.APPLE_TO_OURS`.

Transformers applies them when it loads and reverses them when it saves. Importing this module imports neither torch nor
Transformers.
"""

from typing import TYPE_CHECKING

from ..tensor_names import APPLE_TO_OURS, to_apple_name, to_our_name

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

DROPPED_TENSORS: dict[str, str] = {
    ".self_attn.rotary_emb.inv_freq": "rotary frequencies, stored by old Llama checkpoints; computed from rope_theta",
}
"""Ends of tensor names that a conversion leaves out, each with the reason."""

ENCODER_PREFIXES: tuple[str, ...] = ("model.vision_tower.vision_tower.model.", "model.vision_tower.", "vision_tower.")
"""Prefixes of the encoder's names in a whole checkpoint: Apple's, ours, ours without a language head."""


def is_dropped(name: str) -> bool:
    """Return whether a conversion leaves this tensor out on purpose; see `DROPPED_TENSORS`."""
    return name.endswith(tuple(DROPPED_TENSORS))


def apple_weight_renamings() -> "list[WeightRenaming]":
    """Return the renamings for `register_checkpoint_conversion_mapping("fastvlm", …)`: Apple's names to ours.

    Transformers applies them while loading and reverses them while saving. Every pattern is anchored at the start, so
    our names and an adapter's names do not change.
    """
    from transformers.core_model_loading import WeightRenaming

    # Escaped dots on both sides: the target is the pattern when Transformers reverses the renaming.
    return [
        WeightRenaming("^" + apple.replace(".", r"\."), ours.replace(".", r"\."))
        for apple, ours in APPLE_TO_OURS
        if apple != ours
    ]


def encoder_weight_renamings() -> "list[WeightRenaming]":
    """Return the renamings for `register_checkpoint_conversion_mapping("fastvithd", …)`: from a whole checkpoint.

    They remove the prefix of the encoder's names, one of `ENCODER_PREFIXES`; names without a prefix do not change.
    Other tensors keep their names, and are unexpected to the encoder. As these are `PrefixChange`s, an encoder that was
    loaded without them is saved with its usual tensor names.
    """
    from transformers.core_model_loading import PrefixChange

    return [PrefixChange(prefix_to_remove=prefix.removesuffix(".")) for prefix in ENCODER_PREFIXES]
