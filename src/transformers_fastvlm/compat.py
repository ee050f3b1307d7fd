# SPDX-License-Identifier: Apache-2.0
"""What older supported versions of Transformers lack. Each item names the version at which it can be deleted."""

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling

_VERSION = Version(transformers.__version__)

GENERATE_KEEPS_ENCODER_OUTPUTS = _VERSION < Version("5.20.0.dev0")
"""Delete with support for Transformers < 5.20, whose generate() neither encodes images once before it repeats a batch
nor drops the encoder's outputs after the first step."""

ADAPTERS_LOSE_WHOLE_PARTS = _VERSION < Version("5.19.0.dev0")
"""Delete with support for Transformers < 5.19, whose from_pretrained() leaves out what an adapter has of parts that
were trained whole (peft's `modules_to_save`)."""


def check_adapters(model: Any) -> None:
    """Refuse a model that was loaded from the directory of an adapter, where parts of it would be missing.

    Raises:
        ValueError: the adapter has parts that were trained whole, and this version of Transformers leaves them out.
    """
    configs = getattr(model, "peft_config", {}).values() if ADAPTERS_LOSE_WHOLE_PARTS else ()
    if parts := [part for config in configs for part in config.modules_to_save or ()]:
        raise ValueError(
            f"The adapter comes with a trained {parts[0]}, which Transformers {_VERSION} leaves out: expected 5.19 or "
            "later. Merge the adapter (fastvlm merge), or load it with transformers_fastvlm.training.load_merged."
        )


def encode_and_expand_images(
    model: Any, expand_size: int, input_ids: Tensor | None, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Encode images once and repeat each row's group of images `expand_size` times.

    Transformers < 5.20 repeats `pixel_values` image by image, so that with several images a prompt the second copy of
    a prompt gets the first image twice.

    Args:
        model: a `FastVLMForConditionalGeneration`.
        expand_size: copies of each row.
        input_ids: (batch, length) before expansion, or empty if `model_kwargs` has `inputs_embeds`.
        model_kwargs: generate()'s arguments; `pixel_values`, `image_sizes` and `num_tiles` are taken out.

    Returns:
        The arguments with `mm_encoder_outputs` in their place.
    """
    images = {key: model_kwargs.pop(key, None) for key in ("pixel_values", "image_sizes", "num_tiles")}
    features = model.get_image_features(**images, return_dict=True).pooler_output
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is not None:
        input_ids = None
    if expand_size > 1:
        per_row = model.model.get_placeholder_mask(input_ids, embeds).sum(-1).tolist()
        groups, first = [], 0
        for tokens in per_row:
            last = first
            while tokens > 0 and last < len(features):
                tokens -= len(features[last])
                last += 1
            groups.append(list(features[first:last]))
            first = last
        expanded = [image for group in groups for _ in range(expand_size) for image in group]
        features = torch.stack(expanded) if isinstance(features, Tensor) and expanded else expanded
    return model_kwargs | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}


def forget_renamings(model: Any) -> None:
    """Let a model that was loaded under ZeRO-3 be saved under the names that it is saved under elsewhere.

    Delete when Transformers remembers, under ZeRO-3 as elsewhere, only those renamings that loading has used; 5.23
    remembers and reverses all that it knows, old ones of other models among them.
    """
    if is_deepspeed_zero3_enabled():
        model._weight_conversions = None  # as of a model that was not loaded, which gets this package's
