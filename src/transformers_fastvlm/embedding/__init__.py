# SPDX-License-Identifier: Apache-2.0
"""Vectors of images and texts, for search and clustering; a loss that trains them; sentence-transformers' layout.

Example:
    >>> from transformers_fastvlm.embedding import Embedder
    >>> embedder = Embedder("apple/FastVLM-0.5B")  # doctest: +SKIP
    >>> embedder.embed([Path("photo.jpg"), "a dog on a beach"]).shape  # doctest: +SKIP
    (2, 896)
"""

from typing import TYPE_CHECKING

from .._optional import lazy_names

if TYPE_CHECKING:
    from .contrastive import contrastive_loss, recall
    from .embedder import POOLINGS, Embedder, Input
    from .pooling import pool
    from .sentence_layout import save_for_sentence_transformers

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "contrastive": "contrastive_loss recall",
        "embedder": "POOLINGS Embedder Input",
        "pooling": "pool",
        "sentence_layout": "save_for_sentence_transformers",
    },
)
