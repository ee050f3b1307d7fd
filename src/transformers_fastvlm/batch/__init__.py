# SPDX-License-Identifier: Apache-2.0
"""Ask a question about many images, or make their vectors: from files, folders, tables and videos to one file.

Example:
    >>> from transformers_fastvlm.engines import load_engine
    >>> from transformers_fastvlm.batch import BatchOptions, run_batch
    >>> options = BatchOptions(prompt="Describe the image.")
    >>> load = lambda: load_engine("transformers", "apple/FastVLM-0.5B")
    >>> about = {"model": "apple/FastVLM-0.5B"}
    >>> run_batch(["photos"], "answers.jsonl", load, options, about=about)  # doctest: +SKIP
"""

from ..storage.journal_file import JournalError
from .batch_rows import COLUMNS, Report
from .batch_run import BatchOptions, run_batch
from .embed_run import EmbedOptions, run_embed
from .requests import SourceOptions
from .resuming import Interrupted
from .vector_outputs import VECTOR_COLUMNS

__all__ = [
    "COLUMNS",
    "VECTOR_COLUMNS",
    "BatchOptions",
    "EmbedOptions",
    "Interrupted",
    "JournalError",
    "Report",
    "SourceOptions",
    "run_batch",
    "run_embed",
]
