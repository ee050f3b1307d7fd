# SPDX-License-Identifier: Apache-2.0
"""Helpers of generation: the two names of the cache, a check for NaN scores, and a mask for the image placeholder."""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.cache_utils import Cache

from . import compat

__all__ = ["NeverThePlaceholder", "check_scores", "has_tokens", "one_cache"]


class NeverThePlaceholder(LogitsProcessor):
    """Keeps generate() from producing the image placeholder."""

    supports_continuous_batching = True

    def __init__(self, image_token_id: int):
        self.image_token_id = image_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows, vocab_size) with the placeholder's set to minus infinity."""
        index = torch.full((1,), self.image_token_id, device=scores.device)
        return scores.index_fill(-1, index, -float("inf"))


def check_scores(logits: Tensor) -> None:
    """Raise ValueError if a prompt's last logits (batch, positions, vocab_size) contain NaN."""
    if bool(logits[:, -1].isnan().any()):
        raise ValueError(
            f"The model's first scores are NaN ({logits.dtype}). Its weights hold NaN or infinity, or its dtype "
            'overflows: try dtype="float32", and if that does not help, fetch the checkpoint again.'
        )


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache, passed under one of its two names."""
    if cache is not None and past_key_values is not None:
        raise ValueError("Pass only one of cache and past_key_values: both name the cache of earlier tokens.")
    if past_key_values is None:
        return cache
    if compat.CACHE != "past_key_values" and not torch.compiler.is_compiling():
        message = "`past_key_values` is deprecated since Transformers 5.24; pass the cache as `cache`."
        warnings.warn(message, FutureWarning, stacklevel=3)
    return past_key_values


def has_tokens(cache: Any) -> bool:
    """Whether a cache holds earlier tokens. False for the paged cache of continuous batching."""
    return isinstance(cache, Cache) and int(cache.get_seq_length()) > 0
