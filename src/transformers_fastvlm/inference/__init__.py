# SPDX-License-Identifier: Apache-2.0
"""Faster answers from a loaded model: a fused encoder, and a cache for the common beginning of several prompts."""

from .fusing import fuse
from .prompt_cache import PromptCache

__all__ = ["PromptCache", "fuse"]
