# SPDX-License-Identifier: Apache-2.0
"""What the tests with llama.cpp share: the tiny model's export to GGUF."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from transformers_fastvlm import FastVLMConfig, FastVLMForConditionalGeneration
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.engines.llama_library import LlamaModel, library
from transformers_fastvlm.export import Export, export

PRECISIONS = ("q8_0", "float32", "float16", "q4_0", "q4_k_m")


@functools.cache
def tiny_export() -> Export:
    """Export the tiny model in every precision, once a process; treat the directory as read-only."""
    folder = tempfile.mkdtemp(prefix="fastvlm-gguf-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return export("gguf", "tiny", Path(folder) / "tiny", precision=PRECISIONS)


def saved_model(directory: Path, **sizes: Any) -> Path:
    """Save a model with random weights and the tiny model's tokenizer."""
    content = json.loads((tiny_checkpoint() / "config.json").read_text())
    content |= {"num_hidden_layers": 2, "num_attention_heads": 4, "torch_dtype": "float32", **sizes}
    torch.manual_seed(0)
    shutil.copytree(tiny_checkpoint(), directory)
    (directory / "config.json").write_text(json.dumps(content))
    config = FastVLMConfig.from_pretrained(directory)
    FastVLMForConditionalGeneration(config).eval().save_pretrained(directory)
    return directory


def tokenize(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts by the vocabulary in a GGUF file; special tokens are recognized, none is added."""
    functions, model, found = library(), LlamaModel(path), []
    vocabulary = functions.llama_model_get_vocab(model.pointer)
    for text in texts:
        encoded = text.encode()
        ids = (functions.llama_token * (len(encoded) + 8))()
        number = functions.llama_tokenize(vocabulary, encoded, len(encoded), ids, len(ids), False, True)
        found.append(list(ids[:number]))
    model.close()
    return found
