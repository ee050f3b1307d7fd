# SPDX-License-Identifier: Apache-2.0
"""`fastvlm info`: describe a checkpoint from its config.json and the headers of its safetensors files."""

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import typer

from ..checkpoints.embedded import resolve_model
from ..checkpoints.licences import APPLES, RESEARCH_ONLY, may_be_apples
from . import options
from .cli_errors import UserError, reports_errors
from .model_sources import check_loadable, licence_of, read_config, refuse_adapter

__all__ = ["info"]

SIZES = (256, 512, 768, 1024, 1536, 2048)
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LABELS = 18
"""Width of the labels, in columns."""
_BUFFERS = (".running_mean", ".running_var", ".num_batches_tracked")
_HEAD, _EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
# Prefixes of our tensor names; the first match counts.
_PARTS = (
    ("clip_head", "model.vision_tower.head."),
    ("encoder", "model.vision_tower."),
    ("projector", "model.multi_modal_projector."),
    ("projector", "model.image_newline"),
    ("embeddings", "model.language_model.embed_tokens."),
    ("language_model", "model.language_model."),
    ("head", "lm_head."),
)


@reports_errors
def info(
    model: options.ModelArgument = options.DEFAULT_MODEL,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Describe a checkpoint without loading its weights.

    Shows sizes, parameters of each part, tokens per image at each resolution, dtype, memory, image processing and the
    licence. Apple's weights are for research only.

    Examples:

        fastvlm info apple/FastVLM-0.5B

        fastvlm info tiny --json
    """
    facts = _facts(model)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    lines = list(_lines(facts))
    typer.echo("\n".join(_wrapped(lines, shutil.get_terminal_size().columns) if sys.stdout.isatty() else lines))


def _facts(model: str) -> dict[str, Any]:
    refuse_adapter(model)
    raw = read_config(model)
    directory = _directory(model)
    config: Any
    if raw.get("model_type") == "fast_vlm":
        from ..checkpoints.configs import config_from_native

        layout, config = "native", config_from_native(directory)[0]
    else:
        from transformers import AutoConfig

        check_loadable(model, raw)
        layout = "transformers" if raw["model_type"] == "fastvlm" else "apple"
        config = AutoConfig.from_pretrained(resolve_model(model))
    tensors = _tensors(model, directory, native=layout == "native")
    tied = bool(config.tie_word_embeddings) or _HEAD not in tensors
    parameters = dict.fromkeys((part for part, _ in _PARTS), 0) | {"buffers": 0}
    dtypes: dict[str, int] = {}
    for name, (dtype, shape) in tensors.items():
        parameters[_part(name)] += prod(shape)
        dtypes[dtype] = dtypes.get(dtype, 0) + prod(shape)
    loaded = {name: tensor for name, tensor in tensors.items() if not (tied and name == _HEAD)}
    parameters["head"] = 0 if tied else parameters["head"]
    parameters["total"] = sum(number for part, number in parameters.items() if part != "buffers")
    stored = max(dtypes, key=lambda dtype: dtypes[dtype])
    text, vision = config.text_config, config.vision_config
    return {
        "model": model,
        "layout": layout,
        "model_type": raw["model_type"],
        "language_model": {
            "model_type": text.model_type,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
            "key_value_heads": text.num_key_value_heads,
            "vocabulary": text.vocab_size,
            "context": text.max_position_embeddings,
            "tied_head": tied,
        },
        "encoder": {
            "depths": list(vision.depths),
            "widths": list(vision.hidden_sizes),
            "form": "train-time" if any(".rbr_conv." in name for name in tensors) else "merged",
            "features": vision.num_features,
        },
        "parameters": parameters,
        "dtype": _DTYPES.get(stored, stored),
        "dtype_on_cpu": "float32" if stored == "F16" else _DTYPES.get(stored, stored),
        "memory_bytes": {
            "as_stored": sum(_BYTES.get(dtype, 4) * prod(shape) for dtype, shape in loaded.values()),
            "float32": 4 * (parameters["total"] + parameters["buffers"]),
        },
        "image_processing": _image_processing(config),
        "tokens_per_image": _tokens(config),
        "image_token_id": config.image_token_id,
        "licence": licence_of(model),
    }


def _directory(model: str) -> Path:
    """Return the directory of config.json; for a hub repository, in the cache."""
    source = resolve_model(model)
    if os.path.isdir(source):
        return Path(source)
    from transformers.utils import cached_file

    return Path(str(cached_file(model, "config.json"))).parent


def _tensors(model: str, directory: Path, native: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return (safetensors dtype, shape) of every tensor, by our name or, without one, its stored name."""
    from ..checkpoint_files import read_directory
    from ..checkpoints.layouts import is_dropped, to_our_name
    from ..checkpoints.native import from_native_name

    try:
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in read_directory(directory).items()}
    except FileNotFoundError:
        if os.path.isdir(resolve_model(model)):
            raise
        found = _remote_tensors(model)
    rename = from_native_name if native else to_our_name
    return {rename(name) or name: tensor for name, tensor in found.items() if not is_dropped(name)}


def _remote_tensors(model: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    from huggingface_hub import get_safetensors_metadata

    try:
        files = get_safetensors_metadata(model).files_metadata.values()
    except OSError as error:
        raise UserError(
            f"the weights of {model!r} are not cached and their headers cannot be downloaded ({error}): check the "
            "connection, or use a local directory."
        ) from error
    return {name: (tensor.dtype, tuple(tensor.shape)) for file in files for name, tensor in file.tensors.items()}


def _part(name: str) -> str:
    if name.endswith(_BUFFERS):
        return "buffers"
    for part, start in _PARTS:
        if name.startswith(start):
            return part
    raise UserError(f"the checkpoint has the tensor {name!r}, which is not part of FastVLM; it will not load.")


def _image_processing(config: Any) -> dict[str, Any]:
    return {
        "size": config.vision_config.image_size,
        "aspect_ratio": config.image_aspect_ratio,
        "grids": config.image_grid_pinpoints if config.image_aspect_ratio == "anyres" else None,
        "merge": config.mm_patch_merge_type if config.image_aspect_ratio == "anyres" else None,
        "resampling": "bicubic",
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    }


def _tokens(config: Any) -> dict[str, int]:
    """Return tokens by resolution: "512" is --size 512; for AnyRes "1024x2048" is an image of that size."""
    from ..images.anyres import num_image_tokens

    tile = config.vision_config.image_size
    if config.image_aspect_ratio != "anyres":
        return {str(size): num_image_tokens((size, size), None, size) for size in sorted({*SIZES, tile})}
    grids = config.image_grid_pinpoints
    return {
        f"{width}x{height}": num_image_tokens((height, width), grids, tile, config.mm_patch_merge_type)
        for width, height in grids
    }


def _lines(facts: dict[str, Any]) -> Iterable[str]:
    def line(label: str, value: str) -> str:
        return f"{label:<{_LABELS}}{value}"

    text, encoder, images, memory = (
        facts[name] for name in ("language_model", "encoder", "image_processing", "memory_bytes")
    )
    yield line("model", facts["model"])
    yield line("layout", f"{facts['layout']} ({facts['model_type']})")
    yield line(
        "language model",
        f"{text['model_type']}: {text['layers']} layers, width {text['hidden_size']} and {text['intermediate_size']}, "
        f"{text['heads']} heads ({text['key_value_heads']} for keys and values)",
    )
    yield line("", f"vocabulary {text['vocabulary']:,}, context {text['context']:,} tokens")
    yield line(
        "encoder",
        f"FastViTHD, {encoder['form']}: depths {_spaced(encoder['depths'])}, widths {_spaced(encoder['widths'])}, "
        f"{encoder['features']:,} features",
    )
    yield "parameters"
    remarks = {"clip_head": "not used for text", "head": "shares the embeddings" if text["tied_head"] else ""}
    for part, number in facts["parameters"].items():
        if part != "buffers":
            yield f"  {part.replace('_', ' '):<16}{number:>15,}  {remarks.get(part, '')}".rstrip()
    on_cpu = "" if facts["dtype"] == facts["dtype_on_cpu"] else f", on a CPU {facts['dtype_on_cpu']}"
    yield line("dtype", facts["dtype"] + on_cpu)
    yield line(
        "memory", f"{_size(memory['as_stored'])} for the weights as stored, {_size(memory['float32'])} in float32"
    )
    shapes = {
        "pad": "padded to a black square",
        "square": "cropped to the centre square",
        "anyres": f"as a whole and in tiles (anyres, {images['merge']})",
    }
    yield line(
        "images",
        f"{shapes[images['aspect_ratio']]}, {images['size']}x{images['size']} pixels, {images['resampling']}, "
        "values 0 to 1",
    )
    yield line("tokens per image", ", ".join(f"{size}: {count}" for size, count in facts["tokens_per_image"].items()))
    yield line("<image>", str(facts["image_token_id"]))
    licence = facts["licence"]
    stated = [] if licence == APPLES else [licence or "not stated"]
    if may_be_apples(licence, encoder["widths"]):
        stated.append(f"Apple's weights are {RESEARCH_ONLY}")
    yield line("licence", "; ".join(stated))


def _wrapped(lines: Iterable[str], columns: int) -> list[str]:
    """Wrap lines that are wider than the terminal, with the values aligned."""
    wrapped: list[str] = []
    for line in lines:
        head, value = line[:_LABELS], line[_LABELS:]
        if len(line) <= columns or columns < 2 * _LABELS:
            wrapped.append(line)
            continue
        parts = textwrap.wrap(value, columns - _LABELS, break_long_words=False, break_on_hyphens=False)
        wrapped += [(" " * _LABELS if number else head) + part for number, part in enumerate(parts)]
    return wrapped


def _spaced(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
