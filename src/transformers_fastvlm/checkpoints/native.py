# SPDX-License-Identifier: Apache-2.0
"""Names of tensors in Transformers' own `fast_vlm` port, whose encoder is timm's `fastvit_mci3`: one table, both ways.

Outside the encoder the port's names equal ours. Inside, timm numbers stages where Apple numbers the layers of one
sequence, and its parts have other names; values and shapes are the same, so a conversion only renames.
Source: names of the parameters of timm 1.0's `fastvit_mci3` and of Transformers' `FastVlmForConditionalGeneration`.
"""

import re

from .layouts import to_our_name

__all__ = ["EXTRA_FILE", "NOT_IN_NATIVE", "SECTIONS", "from_native_name", "to_native_name"]

OUR_ENCODER = "model.vision_tower."
NATIVE_ENCODER = "model.vision_tower.timm_model."

NOT_IN_NATIVE: dict[str, str] = {
    "model.vision_tower.head.proj": "the CLIP head, which the language model does not use",
    "model.image_newline": "the learned newline of AnyRes, which the port does not support",
}
"""Our names of tensors that the port does not have; a conversion keeps them in `EXTRA_FILE`."""

EXTRA_FILE = "fastvlm_extra.safetensors"
"""File next to the port's weights with the tensors of `NOT_IN_NATIVE`, by our names. Transformers does not read it."""


def _same(*words: str) -> dict[str, str]:
    return {word: word for word in words}


_PLAIN = _same("conv", "bn", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_MOBILEONE = (
    _PLAIN | _same("reparam_conv") | {"rbr_conv": "conv_kxk", "rbr_scale": "conv_scale", "rbr_skip": "identity"}
)
_BLOCK = (
    _MOBILEONE
    | _same("token_mixer", "mixer", "norm", "qkv", "proj", "fc1", "fc2")
    | {"convffn": "mlp"}
    | {scale: f"{scale}.gamma" for scale in ("layer_scale", "layer_scale_1", "layer_scale_2")}
)
_LARGE_KERNEL = _PLAIN | _same("small_conv") | {"lkb_reparam": "reparam_conv", "lkb_origin": "large_conv"}
_POSITION = _same("reparam_conv", "weight", "bias") | {"pe": "pos_enc"}
_EXPANSION = _MOBILEONE | _same("se") | {"reduce": "fc1", "expand": "fc2"}

SECTIONS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("patch_embed.", "stem.", _MOBILEONE),
    ("network.0.", "stages.0.blocks.", _BLOCK),
    ("network.1.proj.0.", "stages.1.downsample.proj.0.", _LARGE_KERNEL),
    ("network.1.proj.1.", "stages.1.downsample.proj.1.", _MOBILEONE),
    ("network.2.", "stages.1.blocks.", _BLOCK),
    ("network.3.proj.0.", "stages.2.downsample.proj.0.", _LARGE_KERNEL),
    ("network.3.proj.1.", "stages.2.downsample.proj.1.", _MOBILEONE),
    ("network.4.", "stages.2.blocks.", _BLOCK),
    ("network.5.proj.0.", "stages.3.downsample.proj.0.", _LARGE_KERNEL),
    ("network.5.proj.1.", "stages.3.downsample.proj.1.", _MOBILEONE),
    ("network.6.", "stages.3.pos_emb.", _POSITION),
    ("network.7.", "stages.3.blocks.", _BLOCK),
    ("network.8.proj.0.", "stages.4.downsample.proj.0.", _LARGE_KERNEL),
    ("network.8.proj.1.", "stages.4.downsample.proj.1.", _MOBILEONE),
    ("network.9.", "stages.4.pos_emb.", _POSITION),
    ("network.10.", "stages.4.blocks.", _BLOCK),
    ("conv_exp.", "final_conv.", _EXPANSION),
)
"""(our prefix, timm's prefix, {our word: timm's word}) for each part of the encoder. Numbers stay; a word that is not
listed makes the name unknown."""

_REVERSED = tuple((timm, ours, {new: old for old, new in words.items()}) for ours, timm, words in SECTIONS)
# timm keeps a layer scale in a module, so its "layer_scale.gamma" is one word of ours.
_WORD_BREAK = re.compile(r"\.(?!gamma$)")


def _translated(name: str, sections: tuple[tuple[str, str, dict[str, str]], ...]) -> str | None:
    for old, new, words in sections:
        if name.startswith(old):
            parts = [part if part.isdigit() else words.get(part) for part in _WORD_BREAK.split(name.removeprefix(old))]
            return None if None in parts else new + ".".join(part for part in parts if part is not None)
    return None


def to_native_name(name: str) -> str | None:
    """Return the port's name of a tensor, given our name; None if it is unknown or `NOT_IN_NATIVE`."""
    if name in NOT_IN_NATIVE:
        return None
    if name.startswith(OUR_ENCODER):
        inner = _translated(name.removeprefix(OUR_ENCODER), SECTIONS)
        return None if inner is None else NATIVE_ENCODER + inner
    return name if to_our_name(name) == name else None


def from_native_name(name: str) -> str | None:
    """Return our name of a tensor of the port, or of `EXTRA_FILE`; None if it is unknown."""
    if name in NOT_IN_NATIVE:
        return name
    if name.startswith(NATIVE_ENCODER):
        inner = _translated(name.removeprefix(NATIVE_ENCODER), _REVERSED)
        return None if inner is None else OUR_ENCODER + inner
    if name.startswith(OUR_ENCODER):
        return None
    return name if to_our_name(name) == name else None
