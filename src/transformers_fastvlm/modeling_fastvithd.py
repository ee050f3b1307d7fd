# SPDX-License-Identifier: Apache-2.0
"""FastViTHD, the hybrid convolution and attention encoder of FastVLM, in its merged and its train-time form.

The network has a convolutional stem and five stages. Stages 1 to 3 mix positions with depthwise convolutions
(RepMixer), stages 4 and 5 with self-attention; every block ends in a convolutional feed-forward network. At train time
many convolutions have parallel branches with BatchNorm, which `FastViTHDModel.reparameterize` merges into one
convolution without changing the function. Modules carry the names of Apple's checkpoints below `vision_tower`.

Sources: FastVLM, arXiv 2412.13303, section 3 (FastViTHD); FastViT, arXiv 2303.14189, sections 3.1 and 3.2 (RepMixer,
conditional position encoding, large-kernel downsampling); MobileOne, arXiv 2206.04040, section 3.2, and RepVGG, arXiv
2101.03697, section 3.3 (merging of branches). Written from the papers and the published tensors.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN, GELUActivation
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from . import kernels
from .configuration_checks import check_model_type
from .configuration_fastvlm import ENCODER_STRIDE, FastViTHDConfig, FastVLMConfig
from .strict_loading import StrictPreTrainedModel

# Positions in `network`: from this downsampling on, float16 weights work on float32 activations (see `_trunk`).
FIRST_FLOAT32_MODULE = 8
_STAGE_MODULES = (0, 2, 4, 7, 10)
RELOAD = "Load the model again with from_pretrained() to restore its parameters, and call fuse() last or not at all."
"""Advice for operations that a fused encoder does not support."""


class _Conv2d(nn.Conv2d):
    """A convolution that computes in the dtype of its input, also if its weights have a smaller one."""

    def forward(self, input: Tensor) -> Tensor:
        return kernels.conv2d(input, self.weight, self.bias, self.stride[0], int(self.padding[0]), self.groups)


def _may_bypass(*modules: nn.Module) -> bool:
    """Whether these modules may be computed without calling them: they are unmodified and have no hooks."""
    return all(
        type(m) in (_Conv2d, _BatchNorm2d, ConvFFN, GELUActivation)
        and not (m.training or m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__)
        for m in modules
    )


def _conv_gelu(conv: nn.Module, act: nn.Module, hidden: Tensor) -> Tensor:
    """Return act(conv(hidden)), fused into one operation where possible."""
    if kernels.infers_on_cpu(hidden) and _may_bypass(conv, act):
        conv = cast(_Conv2d, conv)
        return kernels.conv2d_gelu(hidden, conv.weight, conv.bias, conv.stride[0], int(conv.padding[0]), conv.groups)
    return act(conv(hidden))


def _runs_backward() -> bool:
    """Whether this is called from within a backward pass."""
    return not torch.compiler.is_compiling() and kernels.in_backward()


def _exact(tensor: Tensor | None) -> Tensor:
    """Return a tensor in float64, on the CPU, since not every device supports that dtype."""
    assert tensor is not None
    return (tensor if tensor.is_meta else tensor.cpu()).double()


class _BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that can use its running statistics in training, and computes in the dtype of its input."""

    def __init__(self, channels: int, config: FastViTHDConfig):
        super().__init__(channels, eps=config.batch_norm_eps)
        freeze = config.freeze_batch_norm
        self.frozen = config.reparameterized if freeze is None else freeze

    def train(self, mode: bool = True) -> "_BatchNorm2d":
        return super().train(mode and not self.frozen)

    def forward(self, input: Tensor) -> Tensor:
        # FSDP's mixed precision casts parameters to a smaller dtype during a step, but not the statistics.
        own = self.running_mean.dtype
        if self.training and _runs_backward():
            # Gradient checkpointing recomputes the block; its statistics were updated the first time.
            weight, bias = self.weight.to(own), self.bias.to(own)
            return F.batch_norm(input, self.running_mean, self.running_var, weight, bias, True, 0.0, self.eps)
        if self.weight.dtype == own and (self.training or own == input.dtype):
            return super().forward(input)
        if self.training:
            self.num_batches_tracked.add_(1)
            weight, bias = self.weight.to(own), self.bias.to(own)
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(input, mean, var, weight, bias, True, cast(float, self.momentum), self.eps)
        mean, var, weight, bias = (
            t.to(input.dtype) for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return F.batch_norm(input, mean, var, weight, bias, eps=self.eps)

    def as_scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return a and b of the evaluation form a * x + b in float64, each of shape (channels,)."""
        scale = _exact(self.weight) / torch.sqrt(_exact(self.running_var) + self.eps)
        return scale, _exact(self.bias) - _exact(self.running_mean) * scale


class _ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over channels: from (batch, channels, height, width) to (batch, positions, channels)."""

    def forward(self, input: Tensor) -> Tensor:
        tokens = input.flatten(2).transpose(1, 2)
        return F.layer_norm(
            tokens, self.normalized_shape, self.weight.to(tokens.dtype), self.bias.to(tokens.dtype), self.eps
        )


class _ConvNorm(nn.Module):
    """A bias-free convolution and its BatchNorm: the unit of each branch."""

    def __init__(self, config: FastViTHDConfig, in_channels: int, out_channels: int, kernel: int, **conv: Any):
        super().__init__()
        self.conv = _Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False, **conv)
        self.bn = _BatchNorm2d(out_channels, config)

    def forward(self, hidden: Tensor) -> Tensor:
        if kernels.infers_on_cpu(hidden) and _may_bypass(self.conv, self.bn):
            # Scaling the kernel costs less than applying BatchNorm to the feature map.
            kernel, bias = (t.to(hidden.dtype) for t in self.merged())
            conv = self.conv
            return kernels.conv2d(hidden, kernel, bias, conv.stride[0], int(conv.padding[0]), conv.groups)
        return self.bn(self.conv(hidden))

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return kernel and bias, in float64, of the single convolution that equals this pair in evaluation."""
        scale, shift = self.bn.as_scale_and_shift()
        return _exact(self.conv.weight) * scale[:, None, None, None], shift


def _identity_kernel(conv: nn.Conv2d) -> Tensor:
    """Return the identity kernel in the shape of `conv`'s, in float64 on the CPU."""
    device = "meta" if conv.weight.is_meta else "cpu"
    kernel = torch.zeros(conv.weight.shape, dtype=torch.float64, device=device)
    out_channels, in_per_group, height, width = kernel.shape
    channel = torch.arange(out_channels, device=kernel.device)
    kernel[channel, channel % in_per_group, height // 2, width // 2] = 1.0
    return kernel


def _pad_kernel(kernel: Tensor, size: int) -> Tensor:
    """Zero-pad an (out, in, k, k) kernel to `size`; with "same" padding it computes the same function."""
    margin = (size - kernel.shape[-1]) // 2
    return F.pad(kernel, [margin] * 4)


def merged_conv(like: nn.Conv2d, kernel: Tensor, bias: Tensor) -> _Conv2d:
    """Return a convolution with the geometry, dtype and device of `like`, and with `kernel` and `bias`."""
    conv = _Conv2d(
        like.in_channels,
        like.out_channels,
        like.kernel_size,  # type: ignore[arg-type]
        stride=like.stride,  # type: ignore[arg-type]
        padding=like.padding,  # type: ignore[arg-type]
        groups=like.groups,
        device=like.weight.device,
        dtype=like.weight.dtype,
    )
    with torch.no_grad():
        conv.weight.copy_(kernel)
        conv.bias.copy_(bias)
    conv.requires_grad_(like.weight.requires_grad)
    return conv


def _float32_from_float16(hidden: Tensor, weight_dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Return a context that disables autocast to float16 if float16 is in use, and an empty one otherwise."""
    device = hidden.device.type
    autocast = kernels.autocasts(hidden) and torch.get_autocast_dtype(device) == torch.float16
    if (autocast or weight_dtype == torch.float16) and device != "meta":
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the mean over the whole map, whatever its size."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.reduce = _Conv2d(channels, channels // reduction, 1)
        self.expand = _Conv2d(channels // reduction, channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(hidden.mean((2, 3), keepdim=True))))
        return hidden * torch.sigmoid(gate)


class MobileOneBlock(nn.Module):
    """A convolution with, at train time, scale and identity branches (MobileOne, section 3.2), then an activation."""

    def __init__(
        self,
        config: FastViTHDConfig,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        scale_branch: bool = True,
        squeeze_excite: bool = False,
        activation: bool = True,
    ):
        super().__init__()
        self.act = ACT2FN[config.hidden_act] if activation else nn.Identity()
        self.se = SqueezeExcite(out_channels) if squeeze_excite else nn.Identity()
        self.merged = config.reparameterized
        geometry: dict[str, Any] = {"stride": stride, "groups": groups}
        if self.merged:
            self.reparam_conv = _Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, **geometry)
            return
        self.rbr_conv = nn.ModuleList([_ConvNorm(config, in_channels, out_channels, kernel, **geometry)])
        has_scale = scale_branch and kernel > 1
        self.rbr_scale = _ConvNorm(config, in_channels, out_channels, 1, **geometry) if has_scale else None
        has_identity = in_channels == out_channels and stride == 1
        self.rbr_skip = _BatchNorm2d(in_channels, config) if has_identity else None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.merged:
            if isinstance(self.se, nn.Identity):
                return _conv_gelu(self.reparam_conv, self.act, hidden)
            return self.act(self.se(self.reparam_conv(hidden)))
        out = self.convolution(hidden)
        if self.rbr_scale is not None:
            out = out + self.rbr_scale(hidden)
        if self.rbr_skip is not None:
            out = out + self.rbr_skip(hidden)
        return self.act(self.se(out))

    @property
    def convolution(self) -> _ConvNorm:
        """The main branch of the train-time form; checkpoints keep it in a list of one."""
        return cast(_ConvNorm, self.rbr_conv[0])

    @property
    def first_conv(self) -> _Conv2d:
        """The convolution applied to the input, in either form."""
        return self.reparam_conv if self.merged else self.convolution.conv

    def merged_kernel(self) -> tuple[Tensor, Tensor]:
        """Return kernel and bias, in float64, of the single convolution that equals all branches."""
        branch = self.convolution
        kernel, bias = branch.merged()
        if self.rbr_scale is not None:
            scale_kernel, scale_bias = self.rbr_scale.merged()
            kernel = kernel + _pad_kernel(scale_kernel, kernel.shape[-1])
            bias = bias + scale_bias
        if self.rbr_skip is not None:
            scale, shift = self.rbr_skip.as_scale_and_shift()
            kernel = kernel + _identity_kernel(branch.conv) * scale[:, None, None, None]
            bias = bias + shift
        return kernel, bias

    def reparameterize(self) -> None:
        """Replace the branches by one convolution."""
        if self.merged:
            return
        self.reparam_conv = merged_conv(self.convolution.conv, *self.merged_kernel())
        del self.rbr_conv, self.rbr_scale, self.rbr_skip
        self.merged = True


class _IdentityNorm(nn.Module):
    """The BatchNorm that a train-time RepMixer subtracts, under the name it has in checkpoints."""

    def __init__(self, config: FastViTHDConfig, channels: int):
        super().__init__()
        self.rbr_skip = _BatchNorm2d(channels, config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.rbr_skip(hidden)


class RepMixer(nn.Module):
    """Depthwise token mixing; at train time x + scale * (mixer(x) - norm(x)) (FastViT, section 3.2)."""

    def __init__(self, config: FastViTHDConfig, channels: int):
        super().__init__()
        self.merged = config.reparameterized
        if self.merged:
            self.reparam_conv = _Conv2d(channels, channels, 3, padding=1, groups=channels)
            return
        self.norm = _IdentityNorm(config, channels)
        self.mixer = MobileOneBlock(config, channels, channels, 3, groups=channels, activation=False)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), config.layer_scale_init_value))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.merged:
            return self.reparam_conv(hidden)
        return hidden + self.layer_scale * (self.mixer(hidden) - self.norm(hidden))

    def reparameterize(self) -> None:
        """Replace mixer, norm and scale by one depthwise convolution."""
        if self.merged:
            return
        conv = self.mixer.convolution.conv
        kernel, bias = self.mixer.merged_kernel()
        norm_scale, norm_shift = self.norm.rbr_skip.as_scale_and_shift()
        identity = _identity_kernel(conv)
        scale = _exact(self.layer_scale).flatten()
        kernel = identity + scale[:, None, None, None] * (kernel - identity * norm_scale[:, None, None, None])
        bias = scale * (bias - norm_shift)
        self.reparam_conv = merged_conv(conv, kernel, bias)
        del self.mixer, self.norm, self.layer_scale
        self.merged = True


class RepCPE(nn.Module):
    """Conditional position encoding: x plus a 7x7 depthwise convolution of x (FastViT, section 3.2)."""

    def __init__(self, config: FastViTHDConfig, channels: int):
        super().__init__()
        self.merged = config.reparameterized
        conv = _Conv2d(channels, channels, 7, padding=3, groups=channels)
        if self.merged:
            self.reparam_conv = conv
        else:
            self.pe = conv

    def forward(self, hidden: Tensor) -> Tensor:
        return self.reparam_conv(hidden) if self.merged else hidden + self.pe(hidden)

    def reparameterize(self) -> None:
        """Fold the addition of x into the convolution."""
        if self.merged:
            return
        kernel = _exact(self.pe.weight) + _identity_kernel(self.pe)
        self.reparam_conv = merged_conv(self.pe, kernel, _exact(self.pe.bias))
        del self.pe
        self.merged = True


class LargeKernelConv(nn.Module):
    """A strided 7x7 depthwise convolution with, at train time, a parallel 3x3 one, then an activation."""

    def __init__(self, config: FastViTHDConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.merged = config.reparameterized
        geometry: dict[str, Any] = {"stride": 2, "groups": in_channels}
        if self.merged:
            self.lkb_reparam = _Conv2d(in_channels, out_channels, 7, padding=3, **geometry)
            return
        self.lkb_origin = _ConvNorm(config, in_channels, out_channels, 7, **geometry)
        self.small_conv = _ConvNorm(config, in_channels, out_channels, 3, **geometry)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.merged:
            return _conv_gelu(self.lkb_reparam, self.act, hidden)
        return self.act(self.lkb_origin(hidden) + self.small_conv(hidden))

    def reparameterize(self) -> None:
        """Replace the two branches by one convolution."""
        if self.merged:
            return
        kernel, bias = self.lkb_origin.merged()
        small_kernel, small_bias = self.small_conv.merged()
        kernel = kernel + _pad_kernel(small_kernel, kernel.shape[-1])
        self.lkb_reparam = merged_conv(self.lkb_origin.conv, kernel, bias + small_bias)
        del self.lkb_origin, self.small_conv
        self.merged = True


class Downsample(nn.Module):
    """Halve height and width and change the number of channels."""

    def __init__(self, config: FastViTHDConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Sequential(
            LargeKernelConv(config, in_channels, out_channels),
            MobileOneBlock(config, out_channels, out_channels, 1),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.proj(hidden)


class ConvFFN(nn.Module):
    """Feed-forward network: 7x7 depthwise convolution, BatchNorm, and two 1x1 convolutions around an activation."""

    def __init__(self, config: FastViTHDConfig, channels: int):
        super().__init__()
        inner = int(channels * config.mlp_ratio)
        self.conv = _ConvNorm(config, channels, channels, 7, groups=channels)
        self.fc1 = _Conv2d(channels, inner, 1)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = _Conv2d(inner, channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.conv(hidden))))

    def add_to(self, hidden: Tensor, scale: Tensor | None, drop_path: nn.Module) -> Tensor:
        """Return hidden + drop_path(scale * self(hidden)); `scale` is None for 1."""
        if kernels.infers_on_cpu(hidden) and _may_bypass(self, self.fc1, self.act, self.fc2):
            layers = (cast(Tensor, t) for fc in (self.fc1, self.fc2) for t in (fc.weight, fc.bias))
            return kernels.feed_forward(self.conv(hidden), hidden, scale, *layers)
        return hidden + drop_path(_scaled(self(hidden), scale))


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply by a layer scale, unless `inference.fuse` has folded it into the layer before."""
    return branch if scale is None else scale * branch


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention, as in *Attention Is All You Need*, section 3.2.1, with the softmax in float32.

    `query`, `key` and `value` have shape (batch, heads, positions, head_dim); returns the output as (batch, positions,
    heads, head_dim) and the weights as (batch, heads, positions, positions).
    """
    weights = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class FastViTHDAttention(nn.Module):
    """Self-attention among all positions of a map, without mask; `qkv` has no bias."""

    def __init__(self, config: FastViTHDConfig, channels: int):
        super().__init__()
        self.config = config
        self.head_dim = config.attention_head_dim
        self.num_heads = channels // self.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = kernels.Linear(channels, 3 * channels, bias=False)
        self.proj = kernels.Linear(channels, channels)

    def forward(self, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend; `tokens` has shape (batch, positions, channels). Returns the output and, if computed, the weights."""
        batch, positions, channels = tokens.shape
        qkv = self.qkv(tokens).view(batch, positions, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        # Attention's backward pass, too, falls back to slow loops for dtypes that the CPU does not support.
        slow = kernels.is_slow(qkv)
        with torch.autocast("cpu", enabled=False) if slow else contextlib.nullcontext():
            query, key, value = (qkv.float() if slow else qkv).unbind(0)
            out, weights = attend(
                self, query, key, value, None, is_causal=False, scaling=self.scaling, dropout=dropout, **kwargs
            )
        out = out.to(qkv.dtype).reshape(batch, positions, channels)
        return self.proj(out), None if weights is None else weights.to(qkv.dtype)


class _DropPath(nn.Module):
    """Stochastic depth: while training, skip a residual branch for whole samples (arXiv 1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        mask = torch.empty((branch.shape[0], 1, 1, 1), dtype=branch.dtype, device=branch.device).bernoulli_(keep)
        return branch * mask / keep


class RepMixerBlock(GradientCheckpointingLayer):
    """A block of stages 1 to 3: RepMixer, then a residual ConvFFN."""

    def __init__(self, config: FastViTHDConfig, channels: int, drop_path: float):
        super().__init__()
        self.token_mixer = RepMixer(config, channels)
        self.convffn = ConvFFN(config, channels)
        self.drop_path = _DropPath(drop_path)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), config.layer_scale_init_value))

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        hidden = self.token_mixer(hidden)
        return self.convffn.add_to(hidden, self.layer_scale, self.drop_path)


class AttentionBlock(GradientCheckpointingLayer):
    """A block of stages 4 and 5: residual self-attention, then a residual ConvFFN."""

    def __init__(self, config: FastViTHDConfig, channels: int, drop_path: float):
        super().__init__()
        self.norm = _ChannelLayerNorm(channels, eps=config.layer_norm_eps)
        self.token_mixer = FastViTHDAttention(config, channels)
        self.convffn = ConvFFN(config, channels)
        self.drop_path = _DropPath(drop_path)
        self.layer_scale_1 = nn.Parameter(torch.full((channels, 1, 1), config.layer_scale_init_value))
        self.layer_scale_2 = nn.Parameter(torch.full((channels, 1, 1), config.layer_scale_init_value))

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        tokens = self.norm(hidden)
        dtype = self.norm.weight.dtype
        if kernels.has_fast_gemm(dtype) or not kernels.infers_on_cpu(tokens):
            # Half precision suffices for normalised tokens, and flash attention requires it.
            tokens = tokens.to(dtype)
        mixed, _ = self.token_mixer(tokens, **kwargs)
        mixed = mixed.to(hidden.dtype).transpose(1, 2).reshape(hidden.shape)
        hidden = hidden + self.drop_path(_scaled(mixed, self.layer_scale_1))
        return self.convffn.add_to(hidden, self.layer_scale_2, self.drop_path)


class FastViTHDStage(nn.Sequential):
    """The blocks of one stage; a separate class so that its output can be recorded as a hidden state."""

    def forward(self, input: Tensor, **kwargs: Any) -> Tensor:
        for block in self:
            input = block(input, **kwargs)
        return input


class _MultiScale(nn.ModuleList):
    """Downsample the first four stages' outputs to the last resolution and concatenate them with the last features."""

    def __init__(self, config: FastViTHDConfig):
        factors = [ENCODER_STRIDE // (4 * 2**stage) for stage in range(4)]
        if config.multi_scale == "pool":
            super().__init__([nn.AvgPool2d(factor) for factor in factors])
        else:
            super().__init__(
                [
                    _Conv2d(width, width, factor, stride=factor, groups=width)
                    for width, factor in zip(config.hidden_sizes, factors, strict=False)
                ]
            )

    def forward(self, stages: list[Tensor], last: Tensor) -> Tensor:
        """Concatenate along the channels; `stages` are four maps at /4, /8, /16 and /32, `last` is at /64."""
        maps = [reduce(stage) for reduce, stage in zip(self, stages, strict=True)]
        return torch.cat([m.to(last.dtype) for m in maps] + [last], dim=1)


class ClipHead(nn.Module):
    """The matrix from mean features to the CLIP embedding."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.proj = nn.Parameter(torch.empty(in_features, out_features))

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled.to(self.proj.dtype) @ self.proj


class FastViTHDPreTrainedModel(StrictPreTrainedModel):
    """Base of the encoder classes: configuration, capabilities, initialisation and the trunk of stem and stages."""

    config: FastViTHDConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["RepMixerBlock", "AttentionBlock", "Downsample", "MobileOneBlock", "RepCPE"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(FastViTHDStage, capture_initial_hidden_state=False),
        "attentions": OutputRecorder(FastViTHDAttention, index=1),
    }
    _may_be_missing = ("multi_scale.",)
    # Whether `inference.fuse` has changed the parameters, irreversibly.
    fused = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a new model so that activations keep their scale, in either form and at any depth.

        Kernels follow He et al., arXiv 1502.01852, section 2.2. Merged mixers and position encodings start as the
        identity, as their train-time forms nearly do. Matrices use `initializer_range`.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.normal_(module.weight, mean=0.0, std=(2.0 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, RepMixer | RepCPE) and module.merged:
            identity = _identity_kernel(module.reparam_conv)
            init.copy_(module.reparam_conv.weight, identity.to(module.reparam_conv.weight))
        elif isinstance(module, RepMixer | RepMixerBlock | AttentionBlock):
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("layer_scale"):
                    init.constant_(parameter, self.config.layer_scale_init_value)
        elif isinstance(module, ClipHead):
            init.normal_(module.proj, mean=0.0, std=module.proj.shape[0] ** -0.5)

    def _build_trunk(self, config: FastViTHDConfig) -> None:
        """Create `patch_embed` and `network` under the names that checkpoints use."""
        widths, depths = config.hidden_sizes, config.depths
        total = sum(depths)
        rates = [config.drop_path_rate * index / max(total - 1, 1) for index in range(total)]
        self.patch_embed = nn.Sequential(
            MobileOneBlock(config, config.num_channels, widths[0], 3, stride=2, scale_branch=False),
            MobileOneBlock(config, widths[0], widths[0], 3, stride=2, groups=widths[0], scale_branch=False),
            MobileOneBlock(config, widths[0], widths[0], 1, scale_branch=False),
        )
        self.network = nn.ModuleList()
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage > 0:
                self.network.append(Downsample(config, widths[stage - 1], width))
            attends = stage >= 3
            if attends:
                self.network.append(RepCPE(config, width))
            block = AttentionBlock if attends else RepMixerBlock
            first = sum(depths[:stage])
            self.network.append(FastViTHDStage(*(block(config, width, rates[first + i]) for i in range(depth))))

    def _check_pixel_values(self, pixel_values: Tensor | None) -> Tensor:
        if pixel_values is None:
            raise ValueError("pixel_values is missing: pass a tensor of shape (batch, channels, height, width).")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, {self.config.num_channels}, "
                "height, width). The processor makes such tensors."
            )
        height, width = pixel_values.shape[-2:]
        if height % ENCODER_STRIDE or width % ENCODER_STRIDE or not height or not width:
            raise ValueError(
                f"pixel_values is {height} high and {width} wide, but both must be positive multiples of "
                f"{ENCODER_STRIDE}. Resize or pad the image, or use the processor."
            )
        return pixel_values.to(self.patch_embed_dtype)

    @property
    def patch_embed_dtype(self) -> torch.dtype:
        """The dtype of the first convolution's weights."""
        return self._stem.weight.dtype

    @property
    def _stem(self) -> _Conv2d:
        return cast(MobileOneBlock, self.patch_embed[0]).first_conv

    def _trunk(self, pixel_values: Tensor | None, last_stage: int = 5, **kwargs: Any) -> list[Tensor]:
        """Run stem and stages and return the outputs of the stem and of stages 1 to `last_stage`.

        In float16 the modules from the last downsampling on compute in float32: with published checkpoints their
        activations come close to the largest float16 number and would overflow to infinity and NaN. These modules are
        a small part of the encoder's work. On a CPU that is slow in the weights' dtype all modules compute in
        float32, except in training.
        """
        self._check_use()
        pixels = self._check_pixel_values(pixel_values)
        if not self.training and kernels.infers_on_cpu(pixels, self._stem.weight) and kernels.is_slow(pixels):
            pixels = pixels.float()
        hidden = self.patch_embed(self._arrange(pixels))
        outputs: list[Tensor] = [hidden]
        for index, module in enumerate(self.network if last_stage else ()):
            context: contextlib.AbstractContextManager = contextlib.nullcontext()
            if index >= FIRST_FLOAT32_MODULE:
                context = _float32_from_float16(hidden, self.patch_embed_dtype)
                hidden = hidden.float() if hidden.dtype == torch.float16 else hidden
            with context:
                hidden = module(hidden, **kwargs) if isinstance(module, FastViTHDStage) else module(hidden)
            if index in _STAGE_MODULES:
                outputs.append(hidden)
                if len(outputs) == last_stage + 1:
                    break
        return outputs

    def _check_use(self) -> None:
        if not self.fused:
            return
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(f"This encoder is fused and cannot be trained. {RELOAD}")
        if not torch.compiler.is_compiling() and any(hasattr(module, "base_layer") for module in self.modules()):
            raise RuntimeError(f"This encoder is fused and cannot carry an adapter such as LoRA. {RELOAD}")

    def _arrange(self, pixel_values: Tensor) -> Tensor:
        """Use the channels-last memory format on a CPU, where it makes convolutions and GEMMs faster.

        The format does not change while BatchNorm updates its statistics: PyTorch sums them in double precision only
        if the channels are first.
        """
        frozen = self.config.freeze_batch_norm
        frozen = self.config.reparameterized if frozen is None else frozen
        if (self.training and not frozen) or not kernels.eager_on_cpu(pixel_values, self._stem.weight):
            return pixel_values
        return pixel_values.contiguous(memory_format=torch.channels_last)

    def reparameterize(self) -> "FastViTHDPreTrainedModel":
        """Merge all train-time branches in place and return the model; a merged model is returned unchanged.

        The merged model computes the same function in evaluation, up to rounding. `config.reparameterized` becomes
        True, so the model can be saved and loaded.

        Raises:
            RuntimeError: the model is in training mode, where branches normalise with batch statistics.
        """
        if self.config.reparameterized:
            return self
        if self.training:
            raise RuntimeError(
                "reparameterize() was called in training mode; call eval() first, since only evaluation is preserved."
            )
        with torch.no_grad():
            for module in list(self.modules()):
                if isinstance(module, MobileOneBlock | RepMixer | RepCPE | LargeKernelConv):
                    module.reparameterize()
                elif isinstance(module, _BatchNorm2d) and self.config.freeze_batch_norm is None:
                    module.frozen = True
        self.config.reparameterized = True
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load an encoder, also from a checkpoint of a whole FastVLM. See `PreTrainedModel.from_pretrained`."""
        if isinstance(config, FastVLMConfig):
            config = config.vision_config
        if config is not None and not isinstance(config, FastViTHDConfig | str | os.PathLike):
            check_model_type({"model_type": config.model_type}, pretrained_model_name_or_path, ("fastvithd",))
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Do not report the rest of a FastVLM as unexpected when only its encoder is loaded."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        loading_info.unexpected_keys = {
            key for key in loading_info.unexpected_keys if not key.startswith(("model.", "lm_head."))
        }


class FastViTHDModel(FastViTHDPreTrainedModel):
    """The FastViTHD encoder: returns a feature map at 1/64 of the image's height and width, and a pooled vector.

    Example:
        >>> import torch
        >>> from transformers_fastvlm import FastViTHDConfig, FastViTHDModel
        >>> config = FastViTHDConfig(depths=[1, 1, 1, 1, 1], hidden_sizes=[8, 16, 32, 64, 128], projection_dim=0)
        >>> encoder = FastViTHDModel(config).eval()
        >>> tuple(encoder(torch.rand(1, 3, 128, 192)).last_hidden_state.shape)
        (1, 256, 2, 3)
    """

    def __init__(self, config: FastViTHDConfig):
        super().__init__(config)
        self._build_trunk(config)
        width = config.hidden_sizes[-1]
        self.conv_exp = MobileOneBlock(config, width, 2 * width, 3, groups=width, squeeze_excite=True)
        self.head = ClipHead(2 * width, config.projection_dim) if config.projection_dim else None
        self.multi_scale = _MultiScale(config) if config.multi_scale else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the first convolution of the stem."""
        return self._stem

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (batch, num_channels, height, width), values in 0 to 1, height and width multiples of 64.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, as in every model of Transformers.
                Attention maps need `attn_implementation="eager"`.

        Returns:
            `last_hidden_state` (batch, num_features, height / 64, width / 64); `pooler_output` (batch, projection_dim),
            the CLIP embedding, or the mean (batch, 2 * hidden_sizes[-1]) if the encoder has no head; `hidden_states`,
            the outputs of the five stages at /4 to /64; `attentions`, the maps (batch, heads, positions, positions)
            of the blocks of stages 4 and 5.

        Raises:
            ValueError: `pixel_values` has another shape.
        """
        attention_kwargs = {k: v for k, v in kwargs.items() if k in ("output_attentions",)}
        stages = self._trunk(pixel_values, **attention_kwargs)
        dtype = self.patch_embed_dtype
        with _float32_from_float16(stages[-1], dtype):
            last = self.conv_exp(stages[-1])
            pooled = last.mean((2, 3)).to(dtype)
            features = self.multi_scale(stages[1:5], last) if self.multi_scale is not None else last
        pooled = self.head(pooled) if self.head is not None else pooled
        return BaseModelOutputWithPooling(last_hidden_state=features.to(dtype), pooler_output=pooled)


class FastViTHDBackbone(BackboneMixin, FastViTHDPreTrainedModel):
    """FastViTHD as a backbone for detection and segmentation: returns the maps of the stages in `config.out_features`.

    Stages are called stem and stage1 to stage5 and have strides 4, 4, 8, 16, 32 and 64.

    Example:
        >>> import torch
        >>> from transformers_fastvlm import FastViTHDBackbone, FastViTHDConfig
        >>> config = FastViTHDConfig(
        ...     depths=[1, 1, 1, 1, 1], hidden_sizes=[8, 16, 32, 64, 128], out_features=["stage2", "stage4"]
        ... )
        >>> [tuple(m.shape) for m in FastViTHDBackbone(config)(torch.rand(1, 3, 128, 128)).feature_maps]
        [(1, 16, 16, 16), (1, 64, 4, 4)]
    """

    has_attentions = True
    # A checkpoint of the encoder ends in layers that a backbone does not have.
    _keys_to_ignore_on_load_unexpected = [r"^conv_exp\.", r"^head\.", r"^multi_scale\."]

    def __init__(self, config: FastViTHDConfig | FastVLMConfig):
        if isinstance(config, FastVLMConfig):
            config = cast(FastViTHDConfig, config.vision_config)
        super().__init__(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self._build_trunk(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the first convolution of the stem."""
        return self._stem

    @can_return_tuple
    @filter_output_hidden_states
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:  # type: ignore[misc]
        """Encode images and return the feature maps of the chosen stages.

        Args:
            pixel_values: (batch, num_channels, height, width), values in 0 to 1, height and width multiples of 64.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `feature_maps`, one (batch, hidden_sizes[i], height / stride, width / stride) per chosen stage; on request
            `hidden_states` and `attentions` as in `FastViTHDModel`.

        Raises:
            ValueError: `pixel_values` has another shape.
        """
        wanted = [self.stage_names.index(name) for name in self.out_features]
        everything = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
        stages = self._trunk(pixel_values, last_stage=5 if everything else max(wanted))
        dtype = self.patch_embed_dtype
        if dtype in (torch.bfloat16, torch.float16):
            # Stages may be computed in float32. Stage 5 of a float16 encoder stays float32: it may overflow float16.
            last = [stages.pop()] if dtype == torch.float16 and len(stages) == 6 else []
            stages = [stage.to(dtype) for stage in stages] + last
        return BackboneOutput(feature_maps=tuple(stages[index] for index in wanted), hidden_states=tuple(stages[1:]))


__all__ = ["FastViTHDBackbone", "FastViTHDModel", "FastViTHDPreTrainedModel"]
