# SPDX-License-Identifier: Apache-2.0
"""Directories that sentence-transformers loads, images included, with its own classes only."""

import json
import os
from pathlib import Path
from typing import Any

from ..storage.atomic_files import new_directory
from .embedder import Embedder

__all__ = ["save_for_sentence_transformers"]

# Classes outside sentence-transformers would need trust_remote_code, even those of an installed package.
_TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
_NORMALIZE = "sentence_transformers.base.modules.normalize.Normalize"
_MODES = {"last": "lasttoken", "mean": "mean"}


def save_for_sentence_transformers(embedder: Embedder, directory: str | os.PathLike[str]) -> Path:
    """Write a checkpoint that `SentenceTransformer(directory)` loads, with the same vectors as the embedder's.

    Loading needs only `import transformers_fastvlm` first, which registers FastVLM with the Auto classes. The directory
    is a complete checkpoint for this package, too, and appears only when it is complete.

    Args:
        embedder: model, pooling and options.
        directory: a directory that does not exist yet, or is empty.

    Returns:
        The directory.

    Raises:
        ValueError: the pooling is "encoder", which sentence-transformers does not support.
        FileExistsError: the directory exists and is not empty.
    """
    if embedder.pooling not in _MODES:
        raise ValueError(
            f"pooling is {embedder.pooling!r}, which sentence-transformers does not support; expected one of "
            f"{', '.join(_MODES)}."
        )
    out = Path(directory)
    with new_directory(out) as partial:
        embedder.model.save_pretrained(partial)
        embedder.processor.save_pretrained(partial)
        for name, content in _files(embedder).items():
            file = partial / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return out


def _files(embedder: Embedder) -> dict[str, Any]:
    """Return the contents of sentence-transformers' files, by name."""
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    modules = [(_TRANSFORMER, ""), (_POOLING, "1_Pooling"), (_NORMALIZE, "2_Normalize")]
    system = embedder.system or ""
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": kind}
            for index, (kind, path) in enumerate(modules if embedder.normalize else modules[:2])
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": output, "image": output, "message": {**output, "format": "structured"}},
            "module_output_name": "token_embeddings",
            "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {"query": system, "document": system},
            "default_prompt_name": "document" if system else None,
            "similarity_fn_name": "cosine" if embedder.normalize else None,
        },
        "1_Pooling/config.json": {
            "embedding_dimension": embedder.dimension,
            "pooling_mode": _MODES[embedder.pooling],
            "include_prompt": True,
        },
    }
    return {**files, "2_Normalize/config.json": {}} if embedder.normalize else files
