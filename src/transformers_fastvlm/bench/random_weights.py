# SPDX-License-Identifier: Apache-2.0
"""Models with random weights: built in memory from a configuration, in a dtype and on a device."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .. import FastVLMConfig
from ..checkpoints.configs import native_config

__all__ = ["encoder_config", "native_twin", "random_model"]

_PATTERN = 1 << 20
_LAYER_SCALE = 0.1
_DEPTHWISE = 0.1


def encoder_config() -> FastVLMConfig:
    """Return the published encoder's configuration, with a minimal language model.

    `fuse` and `random_model` take whole models.
    """
    config: Any = FastVLMConfig.from_preset("0.5b")
    config.text_config.vocab_size, config.text_config.pad_token_id = 1, 0
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    config.vision_config.projection_dim = 0
    found: FastVLMConfig = config
    return found


def native_twin(config: Any) -> Any:
    """Return the configuration of Transformers' `fast_vlm` with timm's encoder and the same shapes."""
    fields = native_config(config, config.text_config.vocab_size)
    fields = {key: value for key, value in fields.items() if key not in ("dtype", "transformers_version")}
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def random_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Return a model of this configuration in evaluation mode, with weights that depend only on their shapes.

    Matrices and kernels preserve the scale of activations, and depthwise kernels are close to the identity, so nothing
    under- or overflows its dtype. Two implementations of a model with the same parameter shapes get the same values.

    Args:
        config: of a class that `AutoModelForImageTextToText` knows.
        attn_implementation: of the whole model, such as "sdpa"; None for Transformers' choice.
    """
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with no_init_weights(), device:
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype, **options)
    model.tie_weights()
    _fill(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    noise = torch.randn(_PATTERN, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            parameter.fill_(_LAYER_SCALE)
        elif parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            pattern = (noise * parameter[0].numel() ** -0.5).to(parameter)
            # Written in the order of a contiguous tensor, independent of the memory format.
            flat = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device).view(-1)
            for start in range(0, flat.numel(), _PATTERN):
                part = flat[start : start + _PATTERN]
                part.copy_(pattern[: len(part)])
            parameter.copy_(flat.view(parameter.shape))
            if parameter.ndim == 4 and parameter.shape[1] == 1 < parameter.shape[2]:
                # FastViTHD chains these without a shortcut, so random kernels would grow without bounds.
                parameter.mul_(_DEPTHWISE)
                parameter[:, :, parameter.shape[2] // 2, parameter.shape[3] // 2] += 1.0
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "num_batches_tracked")):
            buffer.zero_()
        elif name.endswith("running_var"):
            buffer.fill_(1.0)
