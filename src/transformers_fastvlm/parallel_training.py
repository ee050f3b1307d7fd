# SPDX-License-Identifier: Apache-2.0
"""Distributed training where a process has no images: it still runs the encoder, so that the others do not hang."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["others_may_have_images", "zero_through_vision"]


def others_may_have_images(model: Any) -> bool:
    """Whether this process must run the encoder although its batch has no image.

    Distributed processes exchange the gradients of every parameter and, if parameters are sharded, also the parameters
    each time a module runs. If one process skips the encoder, the others wait for ever.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if torch.distributed.get_world_size() == 1:
        return False
    vision = (model.vision_tower, model.multi_modal_projector)
    if model.training and torch.is_grad_enabled():
        if any(parameter.requires_grad for part in vision for parameter in part.parameters()):
            return True
    return any(_is_sharded(module) for part in vision for module in part.modules())


def zero_through_vision(model: Any) -> Tensor:
    """Return a scalar 0 computed by encoder and projector, so that their gradients are zero, not missing.

    The encoder runs on one black image of the smallest size. It runs in evaluation mode, which changes no running
    statistics and draws no random numbers. An encoder without either keeps its mode, and so its gradient
    checkpointing: under ZeRO-3 all processes must recompute the same blocks.
    """
    training = [module for module in model.vision_tower.modules() if module.training]
    traces = (isinstance(module, nn.BatchNorm2d) or getattr(module, "rate", 0) for module in training)
    if not model.config.vision_config.attention_dropout and not any(traces):
        training = []
    for module in training:
        module.training = False
    try:
        channels, side = model.config.vision_config.num_channels, model.config.vision_config.stride
        black = torch.zeros((1, channels, side, side), device=model.device)
        zero = model.get_image_features(black, return_dict=True).pooler_output[:0].sum()
    finally:
        for module in training:
            module.training = True
    total: Tensor = zero if model.image_newline is None else zero + model.image_newline[:0].sum()
    return total


def _is_sharded(module: nn.Module) -> bool:
    """Whether this module's parameters are gathered from other processes when it runs: FSDP, FSDP2 or ZeRO-3."""
    if any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(module).__mro__):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False))
