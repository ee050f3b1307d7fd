# SPDX-License-Identifier: Apache-2.0
"""Check that the language model in a GGUF file belongs to the encoder and the configuration beside it."""

import os
from typing import Any

from ..storage.digests import file_digest
from .gguf_header import GgufArray, GgufHeader

__all__ = ["check_gguf"]

_AGAIN = "Export the model again with `fastvlm export gguf`."
_TEXT, _INT32, _FLOAT32 = 8, 5, 6


def check_gguf(header: GgufHeader, config: Any, config_path: str | os.PathLike[str]) -> None:
    """Check a header before llama.cpp loads the file, which would abort the process for some wrong values.

    Args:
        header: from `read_gguf_header`.
        config: the `FastVLMConfig` of the same directory.
        config_path: its config.json.

    Raises:
        ValueError: a field or tensor does not fit.
    """
    text = config.get_text_config()
    kind = text.model_type
    _expect(header, "general.architecture", kind)
    written = header.metadata.get("fastvlm.config_sha256")
    if written is None:
        raise ValueError(
            f"{header.path} has no fastvlm.config_sha256, so `fastvlm export gguf` did not write it. {_AGAIN}"
        )
    if written != (found := file_digest(config_path)):
        raise ValueError(
            f"{header.path} belongs to another config.json: fastvlm.config_sha256 is {written}, but the digest "
            f"of {config_path} is {found}. Put the files of one export together, or export the model again."
        )
    _expect(header, "fastvlm.image_token_id", config.image_token_id)
    _expect(header, "fastvlm.hidden_size", text.hidden_size)
    _check_sizes(header, text)
    _check_vocabulary(header, text)


def _expect(header: GgufHeader, key: str, expected: Any) -> None:
    _compare(header, key, header.metadata.get(key), expected)


def _compare(header: GgufHeader, name: str, found: Any, expected: Any) -> None:
    if found != expected or isinstance(found, bool):
        raise ValueError(f"{header.path}: {name} is {found!r}; expected {expected!r}, as in config.json. {_AGAIN}")


def _check_sizes(header: GgufHeader, text: Any) -> None:
    kind, head = text.model_type, text.hidden_size // text.num_attention_heads
    needed = {
        "embedding_length": text.hidden_size,
        "block_count": text.num_hidden_layers,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
    }
    optional = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "rope.dimension_count": head,
        "attention.key_length": head,
        "attention.value_length": head,
    }
    numbers = {"rope.freq_base", "attention.layer_norm_rms_epsilon"}  # of the configuration with the same digest
    for name, expected in (needed | optional).items():
        if name in needed or f"{kind}.{name}" in header.metadata:
            _expect(header, f"{kind}.{name}", expected)
    for key in header.metadata:
        if key.startswith(f"{kind}.") and key.removeprefix(f"{kind}.") not in needed | optional | dict.fromkeys(
            numbers
        ):
            raise ValueError(
                f"{header.path} has the field {key}, which FastVLM's language models do not have. {_AGAIN}"
            )
    if header.metadata.get("split.count", 1) > 1:
        raise ValueError(f"{header.path} is one of {header.metadata['split.count']} parts of a split model. {_AGAIN}")


def _check_vocabulary(header: GgufHeader, text: Any) -> None:
    embeddings = header.tensors.get("token_embd.weight")
    shape = None if embeddings is None else embeddings.shape
    _compare(header, "the shape of token_embd.weight", shape, (text.hidden_size, text.vocab_size))
    arrays = {"tokens": _TEXT, "scores": _FLOAT32, "token_type": _INT32}
    for name, kind in arrays.items():
        found = header.metadata.get(f"tokenizer.ggml.{name}")
        if found is not None and found != GgufArray(kind, text.vocab_size):
            length = found.length if isinstance(found, GgufArray) else found
            raise ValueError(
                f"{header.path}: tokenizer.ggml.{name} has {length!r} entries; expected {text.vocab_size}, one for "
                f"each row of the embeddings. {_AGAIN}"
            )
