# SPDX-License-Identifier: Apache-2.0
"""Fusing an encoder for inference: every BatchNorm and layer scale becomes part of the layer before it.

Folding a normalisation into a convolution: RepVGG, arXiv 2101.03697, section 3.3. The fused encoder computes the same
function with fewer operations. Its parameters differ from those of any checkpoint, so it can be neither trained nor
saved.
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

    Branches of the train-time form are merged first. The folding is computed in float64 and rounded once to the dtype
    of the parameters. In float16 the last stage is not fused, nor are layer scales too small for float16. A second call
    changes nothing. To undo fusing, load the model again with from_pretrained().

    A fused encoder raises errors for state_dict() and save_pretrained(), load_state_dict(), training, and adapters
    such as LoRA. The language model does not change.

    Args:
        model: a `FastVLMForConditionalGeneration`, `FastVLMModel`, `FastViTHDModel` or `FastViTHDBackbone`, or any
            module that contains one, in evaluation mode, on any device.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` has no FastViTHD encoder.
        RuntimeError: the encoder is in training mode or carries an adapter.
        ValueError: the encoder's parameters are quantized, sharded, on several devices or not loaded.

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
                f"The encoder's {name} is a {kind}, expected an ordinary floating-point parameter: fuse() supports "
                "neither quantized nor sharded encoders. Exclude the encoder from quantization."
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
    encoder.to("cpu")  # not every device supports float64
    encoder.reparameterize()
    # The end of a float16 encoder computes in float32; rounding its parameters again would lose precision.
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
    """Fold the layer scale `name` into the parameters of `layer`, and set it to None."""
    factors = getattr(block, name).double().flatten()
    assert layer.bias is not None
    weight = layer.weight.double() * factors.view(-1, *[1] * (layer.weight.ndim - 1))
    bias = layer.bias.double() * factors
    if _fits(weight, layer.weight.dtype) and _fits(bias, layer.bias.dtype):
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        setattr(block, name, None)


def _fits(exact: Tensor, dtype: torch.dtype) -> bool:
    """Return whether `dtype` represents the float64 `exact` to full precision, in each row of the first dimension.

    float16 has no numbers between 0 and 6e-8, and few just above.
    """
    rows = exact.flatten(1) if exact.ndim > 1 else exact[:, None]
    error = (rows.to(dtype).double() - rows).abs().amax(1)
    return bool((error <= torch.finfo(dtype).eps * rows.abs().amax(1)).all())


def _refuse_gradient(gradient: Tensor) -> None:
    raise RuntimeError(f"This encoder is fused and cannot be trained: its parameters take no gradients. {RELOAD}")


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    # With keep_vars, torch.export collects the parameters of a graph, which may be fused.
    if not keep_vars:
        raise RuntimeError(f"This encoder is fused and cannot be saved: its parameters fit no checkpoint. {RELOAD}")


def _refuse_load_state_dict(module: nn.Module, *arguments: Any) -> None:
    raise RuntimeError(f"This encoder is fused and cannot load a checkpoint's parameters. {RELOAD}")
