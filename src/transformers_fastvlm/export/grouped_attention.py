# SPDX-License-Identifier: Apache-2.0
"""Attention for exported graphs, in which all heads that share keys and values are one multiplication.

Translated as PyTorch has it, attention repeats all earlier keys and values for each head of the queries at every token,
and transposes the keys. In 4 bits, that and the norms took as long as reading the weights.

Source: grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245, section 2.2.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

__all__ = ["grouped_attention"]

_NAME = "fastvlm_grouped"


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **others: Any
) -> tuple[Tensor, None]:
    """Compute attention, for `AttentionInterface`.

    Args:
        query: (batch, heads, length, head size).
        key, value: (batch, key-value heads, past + length, head size).
        attention_mask: (batch, 1, length, past + length), added to the scores.
        scaling: factor of the scores.

    Returns:
        (batch, length, heads, head size), and no weights.
    """
    batch, heads, length, size = query.shape
    shared = key.shape[1]
    rows = (query * scaling).reshape(batch, shared, heads // shared * length, size)
    scores = (rows @ key.transpose(2, 3)).reshape(batch, shared, heads // shared, length, key.shape[2])
    # In float32, where no sum overflows: a row of -inf would give NaN, also if it is padding.
    weights = (scores.float() + attention_mask[:, :, None].float()).softmax(dim=-1).to(query.dtype)
    found = weights.reshape(batch, shared, heads // shared * length, key.shape[2]) @ value
    return found.reshape(batch, heads, length, size).transpose(1, 2), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, eager_mask)


@contextlib.contextmanager
def grouped_attention(language_model: Any) -> Iterator[None]:
    """Let a Transformers decoder use this attention for a while."""
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)
