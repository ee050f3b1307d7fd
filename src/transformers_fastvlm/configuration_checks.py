# SPDX-License-Identifier: Apache-2.0
"""Checks of a checkpoint's config.json and generation_config.json: one error that names file, field and value.

Transformers accepts any values and fails later, with an unrelated error, where they are invalid. So the table `_RULES`
checks each field that determines the model's shape first; errors of other fields are caught when the configuration is
built (`explained`). Loading, converting and the tools all use this module.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from .checkpoint_files import SINGLE_FILE, read_index, read_json

__all__ = ["check_directory", "check_fields", "check_generation_fields", "check_model_type", "explained"]

_Rule = tuple[Callable[[Any], bool], str]
_GENERATION_FILE = "generation_config.json"
_OURS = ("fastvlm", "llava_qwen2", "llava_llama")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    # Some language models have one number per layer.
    return isinstance(value, list) or (_is_number(value) and value > 0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_ids(value: Any) -> bool:
    return all(type(one) is int for one in (value if isinstance(value, list) else [value]))


def _is_activation(value: Any) -> bool:
    from transformers.activations import ACT2FN

    return isinstance(value, str) and value in ACT2FN


def _is_dtype(value: Any) -> bool:
    import torch

    if isinstance(value, str):
        return value == "auto" or isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
    return isinstance(value, torch.dtype | Mapping)


def _is_rope(value: Any) -> bool:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if not isinstance(value, Mapping):
        return False
    kinds = [value, *(inner for inner in value.values() if isinstance(inner, Mapping))]  # some have one per layer type
    known = ("default", *ROPE_INIT_FUNCTIONS)
    named = [kind.get("rope_type", kind.get("type")) for kind in kinds]
    return all(name is None or name in known for name in named) and all(
        _is_positive(kind.get("rope_theta", 1.0)) for kind in kinds
    )


def _is_quantization(value: Any) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if not isinstance(value, Mapping):
        return hasattr(value, "to_dict")
    if not value or value.get("load_in_8bit") or value.get("load_in_4bit"):
        return True
    method = value.get("quant_method")
    return isinstance(method, str) and method in AUTO_QUANTIZATION_CONFIG_MAPPING


_POSITIVE: _Rule = (_is_positive, "a number above 0")
_ACTIVATION: _Rule = (_is_activation, "an activation that Transformers supports, such as 'gelu' or 'silu'")
_DTYPE: _Rule = (_is_dtype, "a torch dtype, such as 'bfloat16'")
_ROPE: _Rule = (_is_rope, "an object with a rope_type that Transformers supports and a rope_theta above 0")
_OBJECT: _Rule = (lambda value: isinstance(value, Mapping) or hasattr(value, "to_dict"), "an object")
_BOOLEAN: _Rule = (lambda value: isinstance(value, bool), "true or false")

_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        (
            "attention_head_dim",
            "head_dim",
            "hidden_size",
            "image_size",
            "intermediate_size",
            "layer_norm_eps",
            "max_position_embeddings",
            "mlp_ratio",
            "num_attention_heads",
            "num_channels",
            "num_hidden_layers",
            "num_key_value_heads",
            "rms_norm_eps",
            "rope_theta",
            "vocab_size",
        ),
        _POSITIVE,
    ),
    **dict.fromkeys(("hidden_act", "projector_hidden_act"), _ACTIVATION),
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPE),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _ROPE),
    **dict.fromkeys(("auto_map", "text_config", "vision_config"), _OBJECT),
    "architectures": (lambda value: isinstance(value, list), "a list of class names"),
    "image_token_id": (_is_count, "an id, 0 or above"),
    "model_type": (lambda value: isinstance(value, str), "a name"),
    "projection_dim": (_is_count, "a number of channels, or 0"),
    "quantization_config": (_is_quantization, "an object with a quant_method that Transformers supports"),
    "tie_word_embeddings": _BOOLEAN,
}
_GENERATION_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "num_beams", "num_return_sequences"), _POSITIVE),
    "do_sample": _BOOLEAN,
    "temperature": (lambda value: _is_number(value) and value >= 0, "a number, 0 or above"),
    "top_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "top_k": (_is_count, "a whole number, 0 or above"),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (_are_ids, "an id, or a list of ids")),
}


def check_fields(config: Any, source: Any = None) -> None:
    """Raise ValueError if a field of config.json is invalid, in either form, nested configurations included.

    Args:
        config: the file's content, or an equivalent dictionary. None in a field counts as absent.
        source: directory, repository or file that it was read from, for the error.
    """
    where = _file(source)
    if not isinstance(config, Mapping):
        raise ValueError(f"{where} holds {_shown(config)}; expected an object. Copy the checkpoint again.")
    _check(config, _RULES, where, "")
    for part in ("text_config", "vision_config"):
        inner = config.get(part)
        if isinstance(inner, Mapping):
            _check(inner, _RULES, where, part + ".")
    for prefix, fields in (("", config), ("text_config.", config.get("text_config"))):
        if isinstance(fields, Mapping):
            _check_heads(fields, where, prefix)


def _check(fields: Mapping[str, Any], rules: Mapping[str, _Rule], where: str, prefix: str) -> None:
    for name, (holds, expected) in rules.items():
        if fields.get(name) is not None and not holds(fields[name]):
            raise ValueError(_wrong(where, prefix + name, fields[name], expected))


def _check_heads(fields: Mapping[str, Any], where: str, prefix: str) -> None:
    width, heads, shared = (fields.get(n) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ValueError(
            _wrong(where, prefix + "num_key_value_heads", shared, f"a divisor of num_attention_heads, {heads}")
        )
    if isinstance(heads, int) and isinstance(width, int) and fields.get("head_dim") is None and width % heads:
        raise ValueError(_wrong(where, prefix + "hidden_size", width, f"a multiple of num_attention_heads, {heads}"))


def check_generation_fields(content: Mapping[str, Any], source: Any = None) -> None:
    """Raise ValueError if a field of generation_config.json is invalid; arguments as in `check_fields`."""
    _check(content, _GENERATION_RULES, _file(source, _GENERATION_FILE), "")


def check_model_type(config: Mapping[str, Any], source: Any, also: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless a config.json has the model_type of a FastVLM, or one in `also`."""
    kind = config.get("model_type")
    if kind is None or kind in (*_OURS, *also):
        return
    advice = "It is another model: load it with its own class."
    if kind == "fast_vlm":
        advice = f"It is Transformers' own port; convert it once: fastvlm convert {source} OUT --to apple."
    raise ValueError(_wrong(_file(source), "model_type", kind, " or ".join((*_OURS, *also)), advice))


def check_directory(directory: str | os.PathLike[str]) -> None:
    """Raise ValueError if a checkpoint's config.json, generation_config.json or weight index is invalid.

    Missing files are not checked, and no weights are read.
    """
    folder = Path(directory)
    if (folder / "config.json").is_file():
        check_fields(read_json(folder / "config.json"), folder)
    if (folder / _GENERATION_FILE).is_file():
        check_generation_fields(read_json(folder / _GENERATION_FILE), folder)
    if not (folder / SINGLE_FILE).is_file():
        for pattern in ("model.safetensors.index*.json", "pytorch_model.bin.index*.json"):
            for index in sorted(folder.glob(pattern)):
                read_index(index)


@contextlib.contextmanager
def explained(content: Mapping[str, Any], source: Any) -> Iterator[None]:
    """Turn errors of building a configuration from `content` into a ValueError that names the file and the field."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(_field_error(str(error), content, _file(source))) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(
            f"{_file(source)} is not a valid configuration ({type(error).__name__}: {error}). Compare it with the "
            "config.json of a checkpoint that loads, or copy the checkpoint again."
        ) from error
    except ValueError as error:
        if source is None or str(source) in str(error):
            raise
        raise ValueError(f"{_file(source)}: {error}") from error


def _field_error(text: str, content: Mapping[str, Any], where: str) -> str:
    """Rephrase `huggingface_hub`'s error about a field of the wrong type in this module's format."""
    name = re.search(r"field '(\w+)'", text)
    if name is None:
        reason = text.partition("Error: ")[2] or text
        return f"{where}: {' '.join(reason.split())[:300]}"
    parts: list[Any] = [content, content.get("text_config"), content.get("vision_config")]
    value = next((part[name[1]] for part in parts if isinstance(part, Mapping) and name[1] in part), None)
    expected = dict.fromkeys(re.findall(r"expected (.+?), got", text))
    return _wrong(where, name[1], value, " or ".join(expected).replace("NoneType", "null") or "another type")


def _wrong(
    where: str, field: str, value: Any, expected: str, advice: str = "Correct it, or copy the checkpoint again."
) -> str:
    return f"{where}: {field} is {_shown(value)}; expected {expected}. {advice}"


def _file(source: Any, name: str = "config.json") -> str:
    if source is None or not str(source):
        return name
    return str(source) if str(source).endswith(".json") else f"{str(source).rstrip('/')}/{name}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
