# SPDX-License-Identifier: Apache-2.0
"""What the tests with llama.cpp share: the tiny model's export to GGUF."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from transformers_fastvlm.export import Export, export

PRECISIONS = ("q8_0", "float32", "float16", "q4_0", "q4_k_m")


@functools.cache
def tiny_export() -> Export:
    """Export the tiny model in every precision, once a process; treat the directory as read-only."""
    folder = tempfile.mkdtemp(prefix="fastvlm-gguf-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return export("gguf", "tiny", Path(folder) / "tiny", precision=PRECISIONS)
