# SPDX-License-Identifier: Apache-2.0
"""Faster answers from a loaded model: a fused encoder, and what several questions share is computed once."""

from .fusing import fuse
from .prompt_cache import PromptCache

__all__ = ["PromptCache", "fuse"]
