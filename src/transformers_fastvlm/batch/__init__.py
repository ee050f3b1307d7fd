# SPDX-License-Identifier: Apache-2.0
"""Ask a question about many images: the input is files, folders, tables and videos, the output one file of answers.

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
from .batch_run import BatchOptions, Interrupted, run_batch
from .requests import SourceOptions

__all__ = ["COLUMNS", "BatchOptions", "Interrupted", "JournalError", "Report", "SourceOptions", "run_batch"]
