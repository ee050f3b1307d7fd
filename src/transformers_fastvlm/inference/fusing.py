# SPDX-License-Identifier: Apache-2.0
"""Fusing an encoder for inference: every BatchNorm and layer scale becomes part of the layer before it.

Folding a normalisation into a convolution: RepVGG, arXiv 2101.03697, section 3.3. The fused encoder computes the same
function with fewer operations, from parameters that no checkpoint has; so it neither trains nor saves.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..modeling_fastvithd import (
    FIRST_FLOAT32_MODULE,
    RELOAD,
    AttentionBlock,
    ConvFFN,
    FastViTHDPreTrainedModel,
    RepMixerBlock,
    merged_conv,
)

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """Fold BatchNorms and layer scales of a FastViTHD encoder into its convolutions and matrices, in place.

    Branches of the train-time form are merged first. The folding is computed in float64 and rounded once to the type
    of the parameters. In float16 the last stage stays as it is, and so does a layer scale that is too small for that.
    Calling it again changes nothing. Loading the model again with from_pretrained() is the way back.

    A fused encoder refuses state_dict(), and so save_pretrained(); load_state_dict(); training; and adapters such as
    LoRA. The language model beside it stays as it is.

    Args:
        model: a `FastVLMForConditionalGeneration`, `FastVLMModel`, `FastViTHDModel` or `FastViTHDBackbone`, or any
            module that holds some of them, in evaluation mode, on any device.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` has no FastViTHD encoder.
        RuntimeError: the encoder is in training mode or carries an adapter.
        ValueError: the encoder's parameters are quantised, sharded, on several devices or not loaded.

    Example:
        >>> from transformers_fastvlm import FastViTHDConfig, FastViTHDModel
        >>> from transformers_fastvlm.inference import fuse
        >>> config = FastViTHDConfig(depths=[1, 1, 1, 1, 1], hidden_sizes=[8, 16, 32, 64, 128])
        >>> fuse(FastViTHDModel(config).eval()).fused
        True
    """
    encoders = [module for module in model.modules() if isinstance(module, FastViTHDPreTrainedModel)]
    if not encoders:
        raise TypeError(
            f"fuse() got a {type(model).__name__}, which has no FastViTHD encoder; expected a FastVLM model."
        )
    pending = [encoder for encoder in encoders if not encoder.fused]
    for encoder in pending:
        _check(encoder)
    for encoder in pending:
        _fuse_encoder(encoder)
    return model


def _check(encoder: FastViTHDPreTrainedModel) -> None:
    """Refuse an encoder whose parameters cannot be folded."""
    if any(module.training for module in encoder.modules()):
        raise RuntimeError("fuse() was called in training mode; call eval() first, since only evaluation is preserved.")
    for name, module in encoder.named_modules():
        if hasattr(module, "base_layer"):
            raise RuntimeError(f"The encoder's {name} carries an adapter; merge or unload it before fuse().")
    parameters = dict(encoder.named_parameters())
    for name, parameter in parameters.items():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            kind = f"{type(parameter).__name__} of {parameter.dtype}"
            raise ValueError(
                f"The encoder's {name} is a {kind}, expected an ordinary floating-point parameter: fuse() works "
                "neither on quantised nor on sharded encoders. Keep the encoder out of the quantisation."
            )
    devices = sorted({str(parameter.device) for parameter in parameters.values()})
    if len(devices) > 1 or devices == ["meta"]:
        raise ValueError(
            f"The encoder's parameters are on {' and '.join(devices)}, expected one device that holds values. Load the "
            "model without offloading the encoder (device_map) before fuse()."
        )


@torch.no_grad()
def _fuse_encoder(encoder: FastViTHDPreTrainedModel) -> None:
    device = next(encoder.parameters()).device
    encoder.to("cpu")  # not every device has float64
    encoder.reparameterize()
    # The end of a float16 encoder is computed in float32, for which rounding its parameters again would be a loss.
    float16 = encoder.patch_embed_dtype == torch.float16
    folded = encoder.network[:FIRST_FLOAT32_MODULE] if float16 else encoder.network
    for module in list(folded.modules()):
        if isinstance(module, ConvFFN):
            _fold_norm(module)
        elif isinstance(module, RepMixerBlock):
            _fold_scale(module, "layer_scale", module.convffn.fc2)
        elif isinstance(module, AttentionBlock):
            _fold_scale(module, "layer_scale_1", module.token_mixer.proj)
            _fold_scale(module, "layer_scale_2", module.convffn.fc2)
    encoder.to(device)
    encoder.fused = True
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.register_hook(_refuse_gradient)
    encoder.register_state_dict_pre_hook(_refuse_state_dict)
    encoder.register_load_state_dict_pre_hook(_refuse_load_state_dict)


def _fold_norm(network: ConvFFN) -> None:
    """Replace the depthwise convolution and its BatchNorm by one convolution."""
    kernel, bias = network.conv.merged()
    dtype = network.conv.conv.weight.dtype
    if _fits(kernel, dtype) and _fits(bias, dtype):
        network.conv = merged_conv(network.conv.conv, kernel, bias)  # type: ignore[assignment]


def _fold_scale(block: nn.Module, name: str, layer: nn.Conv2d | nn.Linear) -> None:
    """Multiply the outputs of `layer` by the layer scale called `name`, which is None from then on."""
    factors = getattr(block, name).double().flatten()
    assert layer.bias is not None
    weight = layer.weight.double() * factors.view(-1, *[1] * (layer.weight.ndim - 1))
    bias = layer.bias.double() * factors
    if _fits(weight, layer.weight.dtype) and _fits(bias, layer.bias.dtype):
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        setattr(block, name, None)


def _fits(exact: Tensor, dtype: torch.dtype) -> bool:
    """Return whether `dtype` holds the float64 `exact` to its own precision, in each row of the first dimension.

    float16 has no numbers between 6e-8 and 0, and few near them.
    """
    rows = exact.flatten(1) if exact.ndim > 1 else exact[:, None]
    error = (rows.to(dtype).double() - rows).abs().amax(1)
    return bool((error <= torch.finfo(dtype).eps * rows.abs().amax(1)).all())


def _refuse_gradient(gradient: Tensor) -> None:
    raise RuntimeError(f"This encoder is fused, and its parameters have no use for gradients. {RELOAD}")


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    # With keep_vars, torch.export collects the parameters of a graph, which may well be fused.
    if not keep_vars:
        raise RuntimeError(f"This encoder is fused and cannot be saved: no checkpoint has its parameters. {RELOAD}")


def _refuse_load_state_dict(module: nn.Module, *arguments: Any) -> None:
    raise RuntimeError(f"This encoder is fused and cannot take a checkpoint's parameters. {RELOAD}")
