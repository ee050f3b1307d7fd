# SPDX-License-Identifier: Apache-2.0
"""A model's parts as modules with plain tensors as inputs and outputs, and as `torch.export` programs.

    pixel_values ─ VisionEncoder (Encoder, Projector) ─► image_features ─┐
    input_ids ─── TokenEmbedding ──────────────────────► inputs_embeds ──┴► Decoder, with past keys and values ─► logits

Every program takes any batch size, any number of tokens, and images whose height and width are multiples of 64. Inputs
and outputs are float32 for every internal dtype, so parts of different precision fit together.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache

from .. import compat
from .grouped_attention import grouped_attention

__all__ = [
    "Decoder",
    "Encoder",
    "KeyValues",
    "Projector",
    "TokenEmbedding",
    "VisionEncoder",
    "export_decode",
    "export_embedding",
    "export_encoder",
    "export_projector",
    "export_vision",
]

KeyValues = list[tuple[Tensor, Tensor]]
"""A layer's keys and values, each (batch, key-value heads, tokens, head size)."""

# torch.export would make dimensions of 1 constant and equal dimensions one.
_EXAMPLE_BATCH, _EXAMPLE_LENGTH, _EXAMPLE_PAST = 2, 3, 5


class Encoder(nn.Module):
    """The vision encoder: pixel_values (batch, 3, height, width) to (batch, features, height / 64, width / 64)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the feature map, in float32."""
        return self.vision_tower(pixel_values).last_hidden_state.float()


class Projector(nn.Module):
    """The projector: features (batch, features, rows, columns) to (batch, rows * columns, hidden)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.multi_modal_projector = model.model.multi_modal_projector

    def forward(self, features: Tensor) -> Tensor:
        """Return the image features, in float32."""
        return self.multi_modal_projector(features.flatten(2).transpose(1, 2)).float()


class VisionEncoder(nn.Module):
    """Encoder and projector: pixel_values (batch, 3, height, width) to image features (batch, tokens, hidden)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.projector = Encoder(model), Projector(model)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the image features, in float32."""
        return self.projector(self.encoder(pixel_values))


class TokenEmbedding(nn.Module):
    """The tokens' embeddings: input_ids (batch, length) to (batch, length, hidden).

    If the placeholder has no embedding, row 0 is used; the image features replace it later.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()
        token = model.config.image_token_id
        self.rowless = token if token is not None and token >= model.config.text_config.vocab_size else None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings, in float32."""
        if self.rowless is not None:
            input_ids = input_ids.masked_fill(input_ids == self.rowless, 0)
        return self.embed_tokens(input_ids).float()


class Decoder(nn.Module):
    """Language model and head, with keys and values of earlier tokens as plain tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.cache_argument = compat.cache_argument(self.language_model)

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: KeyValues
    ) -> tuple[Tensor, KeyValues]:
        """Run new tokens.

        Args:
            inputs_embeds: (batch, length, hidden).
            attention_mask: int64 (batch, past + length), 1 for tokens and 0 for padding.
            position_ids: int64 (batch, length).
            past_key_values: of earlier tokens, one pair a layer; of no tokens before the first.

        Returns:
            logits (batch, length, vocabulary), and keys and values of all tokens, all in float32.
        """
        dtype = self.lm_head.weight.dtype
        cache = DynamicCache(ddp_cache_data=[(key.to(dtype), value.to(dtype)) for key, value in past_key_values])
        hidden = self.language_model(
            inputs_embeds=inputs_embeds.to(dtype),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self.cache_argument: cache},
        ).last_hidden_state
        present = [(layer.keys.float(), layer.values.float()) for layer in cache.layers]
        return self.lm_head(hidden).float(), present


def _export(part: type[nn.Module], model: Any, arguments: tuple[Any, ...], shapes: tuple[Any, ...]) -> ExportedProgram:
    if model.training:
        raise RuntimeError("The model is in training mode, but only evaluation mode is exported; call eval() first.")
    with torch.no_grad():
        return torch.export.export(part(model).eval(), arguments, dynamic_shapes=shapes, strict=False)


def _export_maps(part: type[nn.Module], model: Any, stride: int, channels: int) -> ExportedProgram:
    """Export a part that takes a batch of maps whose sides are multiples of `stride`."""
    rows, columns = (Dim(name, min=2) if stride == 1 else stride * Dim(name, min=2) for name in ("rows", "columns"))
    example = torch.zeros((_EXAMPLE_BATCH, channels, 2 * stride, 3 * stride))
    return _export(part, model, (example,), ({0: Dim("batch"), 2: rows, 3: columns},))


def export_encoder(model: Any) -> ExportedProgram:
    """Return the program of `Encoder`, for images of at least 128 pixels a side."""
    vision = model.config.vision_config
    return _export_maps(Encoder, model, vision.stride, vision.num_channels)


def export_projector(model: Any) -> ExportedProgram:
    """Return the program of `Projector`, for maps of at least 2 x 2 features."""
    return _export_maps(Projector, model, 1, model.config.vision_config.num_features)


def export_vision(model: Any) -> ExportedProgram:
    """Return the program of `VisionEncoder`, for images of at least 128 pixels a side."""
    vision = model.config.vision_config
    return _export_maps(VisionEncoder, model, vision.stride, vision.num_channels)


def export_embedding(model: Any) -> ExportedProgram:
    """Return the program of `TokenEmbedding`."""
    ids = torch.zeros((_EXAMPLE_BATCH, _EXAMPLE_LENGTH), dtype=torch.long)
    return _export(TokenEmbedding, model, (ids,), ({0: Dim("batch"), 1: Dim("length")},))


def export_decode(model: Any) -> ExportedProgram:
    """Return the program of `Decoder`, for a prompt, with a past of no tokens, and for further tokens after it.

    torch.export bounds the mask's length: earlier and new tokens together must be at least 4.
    """
    text = model.config.text_config
    batch, length, past = _EXAMPLE_BATCH, _EXAMPLE_LENGTH, _EXAMPLE_PAST
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = torch.zeros((batch, text.num_key_value_heads, past, head_size))
    arguments = (
        torch.zeros((batch, length, text.hidden_size)),
        torch.ones((batch, past + length), dtype=torch.long),
        torch.arange(past, past + length).expand(batch, -1).contiguous(),
        [(keys.clone(), keys.clone()) for _ in range(text.num_hidden_layers)],
    )
    batch_dim, length_dim = Dim("batch"), Dim("length")
    kept = {0: batch_dim, 2: Dim("past")}
    shapes = (
        {0: batch_dim, 1: length_dim},
        {0: batch_dim, 1: Dim.AUTO},  # past + length, which a Dim cannot express
        {0: batch_dim, 1: length_dim},
        [(kept, kept) for _ in range(text.num_hidden_layers)],
    )
    with grouped_attention(model.get_decoder()):
        return _export(Decoder, model, arguments, shapes)
