# SPDX-License-Identifier: Apache-2.0
"""GGUF files of a language model, for llama.cpp.

Tensors are converted one at a time while they are written, so memory stays close to the model's size. Norms and biases
are always float32. A tied head is left out: llama.cpp then multiplies by the embeddings.
Source: names of tensors and fields in the package `gguf`; the order of a Llama's heads in llama.cpp's conversion.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.licences import APPLES
from .export_source import Source
from .gguf_vocabulary import plain_template, read_vocabulary

__all__ = ["KINDS", "OWN_KEYS", "FileKind", "check_language_model", "kind_of_dtype", "write_gguf"]

OWN_KEYS = ("fastvlm.image_token_id", "fastvlm.image_tokens", "fastvlm.hidden_size", "fastvlm.config_sha256")
"""Fields of this package, by which an engine knows that encoder and language model belong together."""


@dataclass(frozen=True)
class FileKind:
    """Types of a file's tensors, by their names in `gguf`.

    Attributes:
        file_type: in `gguf.LlamaFileType`.
        matrices: in `gguf.GGMLQuantizationType`, of the layers' matrices.
        embeddings: of the embeddings and the head, which need more bits.
    """

    file_type: str
    matrices: str
    embeddings: str


KINDS = {
    "float32": FileKind("ALL_F32", "F32", "F32"),
    "float16": FileKind("MOSTLY_F16", "F16", "F16"),
    "bfloat16": FileKind("MOSTLY_BF16", "BF16", "BF16"),
    "q8_0": FileKind("MOSTLY_Q8_0", "Q8_0", "Q8_0"),
    "q4_0": FileKind("MOSTLY_Q4_0", "Q4_0", "Q8_0"),
}
"""The precisions that the package `gguf` writes. bfloat16 is only a source for others."""


def kind_of_dtype(dtype: torch.dtype) -> str:
    """Return the precision that keeps weights of a dtype as they are."""
    return {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(dtype, "float32")


def check_language_model(config: Any) -> None:
    """Raise ValueError unless llama.cpp computes the language model: a Qwen2 or Llama with the usual parts."""
    text = config.text_config
    rope = text.rope_parameters or {}
    head_size = getattr(text, "head_dim", None)
    usual = head_size is None or head_size == text.hidden_size // text.num_attention_heads
    found = {
        "model_type": None if text.model_type in ("qwen2", "llama") else text.model_type,
        "hidden_act": None if text.hidden_act == "silu" else text.hidden_act,
        "use_sliding_window": getattr(text, "use_sliding_window", None) or None,
        "attention_bias": getattr(text, "attention_bias", None) or None,
        "mlp_bias": getattr(text, "mlp_bias", None) or None,
        "rope_type": None if rope.get("rope_type", "default") == "default" else rope["rope_type"],
        "head_dim": None if usual else head_size,
    }
    wrong = ", ".join(f"{name} {value!r}" for name, value in found.items() if value is not None)
    if wrong:
        raise ValueError(
            f"The language model has {wrong}; the target 'gguf' writes Qwen2 and Llama with full attention, plain "
            "rotary positions and heads of hidden_size / num_attention_heads channels. Export to 'onnx' instead."
        )


def write_gguf(path: Path, model: Any, source: Source, precision: str, own: dict[str, int | str]) -> None:
    """Write the language model of `model`.

    Args:
        path: of the new file.
        model: a `FastVLMForConditionalGeneration`; only its language model and head are read.
        source: the checkpoint, for the tokenizer, the licence and the name.
        precision: a key of `KINDS`.
        own: values of `OWN_KEYS`.
    """
    import gguf

    kind = KINDS[precision]
    writer = gguf.GGUFWriter(path, model.config.text_config.model_type)
    try:
        _describe(writer, model, source, kind)
        for key, value in own.items():
            writer.add_uint32(key, value) if isinstance(value, int) else writer.add_string(key, value)
        planned = [(name, tensor, _type(name, tensor, kind)) for name, tensor in _tensors(model)]
        for name, tensor, type_ in planned:
            block, size = gguf.GGML_QUANT_SIZES[type_]
            writer.add_tensor_info(
                name, tuple(tensor.shape), np.dtype(np.float32), tensor.numel() // block * size, raw_dtype=type_
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor, type_ in planned:
            writer.write_tensor_data(gguf.quants.quantize(_array(name, tensor, model.config.text_config), type_))
    finally:
        writer.close()


def _describe(writer: Any, model: Any, source: Source, kind: FileKind) -> None:
    """Add the fields about the model: origin, sizes and tokenizer."""
    import gguf

    text = model.config.text_config
    writer.add_type("model")
    writer.add_name(source.name)
    writer.add_description(
        "The language model of a FastVLM. Its encoder is vision_encoder.onnx in the same directory, and runs with "
        "transformers-fastvlm."
    )
    if source.licence or source.may_be_apples:
        writer.add_license(source.licence or APPLES)
    if "/" in source.name:
        organization, name = source.name.split("/", 1)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{source.name}")
    writer.add_file_type(gguf.LlamaFileType[kind.file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    rows = model.get_input_embeddings().weight.shape[0]
    writer.add_vocab_size(rows)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_rope_dimension_count(text.hidden_size // text.num_attention_heads)
    writer.add_rope_freq_base((text.rope_parameters or {}).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    _describe_tokenizer(writer, model, source, rows)


def _describe_tokenizer(writer: Any, model: Any, source: Source, rows: int) -> None:
    text, tokenizer = model.config.text_config, source.processor.tokenizer
    vocabulary = read_vocabulary(tokenizer, rows)
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)
    ends = model.generation_config.eos_token_id
    ends = text.eos_token_id if ends is None else ends
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": ends[0] if isinstance(ends, list) else ends,
        "pad": text.pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
    }
    for name, token in ids.items():
        if token is not None and 0 <= token < rows:
            getattr(writer, f"add_{name}_token_id")(token)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    writer.add_chat_template(plain_template(text.model_type))


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors by their names in GGUF; the embeddings are the first."""
    import gguf

    text = model.config.text_config
    architecture = {"qwen2": gguf.MODEL_ARCH.QWEN2, "llama": gguf.MODEL_ARCH.LLAMA}[text.model_type]
    names = gguf.get_tensor_name_map(architecture, text.num_hidden_layers)
    head, embeddings = model.lm_head.weight, model.get_input_embeddings().weight
    tensors = {f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()}
    if head is not embeddings:
        tensors["lm_head.weight"] = head
    for name, tensor in tensors.items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ValueError(
                f"GGUF has no name for the tensor {name} of a {text.model_type}. Export to 'onnx' instead."
            )
        yield new, tensor.detach()


def _type(name: str, tensor: Tensor, kind: FileKind) -> Any:
    """Return the type of a tensor. Rows that cannot be cut into a type's blocks become float16, as in libllama."""
    import gguf

    types = gguf.GGMLQuantizationType
    if tensor.ndim == 1:
        return types.F32
    wanted = types[kind.embeddings if name in ("token_embd.weight", "output.weight") else kind.matrices]
    return types.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _array(name: str, tensor: Tensor, text: Any) -> np.ndarray:
    """Return a tensor in float32, with the rows of a Llama's queries and keys in llama.cpp's order.

    Transformers rotates the first half of a head's channels with the second half; llama.cpp's Llama rotates each even
    channel with the next.
    """
    array: np.ndarray = tensor.float().contiguous().numpy()
    heads = {"attn_q.weight": text.num_attention_heads, "attn_k.weight": text.num_key_value_heads}.get(
        name.split(".", 2)[-1]
    )
    if text.model_type != "llama" or heads is None:
        return array
    rows, columns = array.shape
    swapped = array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)
    return np.ascontiguousarray(swapped.reshape(math.prod(swapped.shape[:3]), columns))
