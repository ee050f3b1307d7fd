# SPDX-License-Identifier: Apache-2.0
"""The target `apple-app`: the folder that Apple's app takes, encoder for Core ML and language model for MLX.

The app compiles fastvithd.mlpackage, and reads config.json, tokenizer, preprocessor_config.json and every safetensors
file. Nothing of it runs on Linux, so each half is checked on its own. Source: github.com/apple/ml-fastvlm, app/FastVLM.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint_files import read_json
from ..checkpoints.configs import apple_config
from ..checkpoints.files import write_json
from .coreml import PACKAGE, convert_encoder
from .export_source import Source
from .mlx import check_language_model, save_tokenizer
from .mlx_weights import quantization_of, read_weights, renamed, write_weights
from .reference import merged_model, relative_error
from .targets import ExportOptions, Report, how_to_run

__all__ = ["write"]

MODULES: tuple[tuple[str, str], ...] = (
    ("model.multi_modal_projector.linear_1.", "multi_modal_projector.linear_0."),
    ("model.multi_modal_projector.linear_2.", "multi_modal_projector.linear_2."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""Pairs (our prefix, the app's)."""

_APP_SIZE, _APP_CHANNELS = 1024, 3072
_TOLERANCE = {"float16": 1e-2, "q8": 5e-2, "q4": 5e-1}


def write(source: Source, out: Path, options: ExportOptions) -> Report:
    """Write the folder. See `targets`."""
    text = source.config.text_config
    if text.model_type != "qwen2":
        raise ValueError(
            f"The language model is a {text.model_type!r}; Apple's app runs Qwen2 alone, with Qwen2's prompts. Export "
            "to 'mlx' or 'onnx' instead."
        )
    check_language_model(source, "Apple's app")
    token_id = source.processor.image_token_id
    if token_id >= text.vocab_size:
        raise ValueError(
            f"<image> has the id {token_id}, but there are {text.vocab_size} embeddings; Apple's app looks it up in "
            "them. Resize the model's token embeddings first."
        )
    side = source.image_size
    errors, _ = convert_encoder(source, out / PACKAGE, "float32", (side,), options)
    model = merged_model(source, "auto")
    tensors = _tensors(model)
    quantization = quantization_of(options.precision)
    options.say(f"writing {len(tensors)} tensors")
    write_weights(out, tensors, "float16", quantization, quantizable="language_model.")
    error = _weights_error(out, tensors, quantization)
    errors[f"{options.precision}: weights of projector and language model"] = error
    if not error <= _TOLERANCE[options.precision]:
        raise ValueError(f"The written weights differ too much from the model's: {errors}. Please report it.")
    model.generation_config.save_pretrained(out)
    save_tokenizer(source, out)
    _name_tokenizer(out)
    for name, content in _processor_files(side).items():
        write_json(out / name, content)
    write_json(out / "config.json", _config(model, token_id, quantization))
    return Report(
        checked_in=None,
        errors=errors,
        how_to_run=how_to_run("apple-app"),
        limits=tuple(_limits(side, source.config.vision_config.num_features, source)),
        notes=(
            "Apple's app does not run here. The encoder's program was evaluated in PyTorch, and the language model's "
            f"weights were read back with MLX {importlib.metadata.version('mlx')}.",
        ),
        library_name="mlx",
    )


def _tensors(model: Any) -> dict[str, Tensor]:
    tied = model.config.tie_word_embeddings
    skipped = ("model.vision_tower.", "model.image_newline", *(("lm_head.",) if tied else ()))
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(skipped)}
    return {renamed(name, MODULES, "Apple's app"): tensor for name, tensor in kept.items()}


def _weights_error(out: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> float:
    """Return the relative error of all written weights together, after reading them back."""
    squares, total = 0.0, 0.0
    written = read_weights(out, quantization)
    if written.keys() != tensors.keys():
        raise ValueError(f"The written names differ from the model's: {sorted(written.keys() ^ tensors.keys())[:5]}.")
    for name, tensor in tensors.items():
        expected = tensor.detach().float()
        norm = float(expected.norm())
        squares += (relative_error(written[name](), expected) * norm) ** 2 if norm else 0.0
        total += norm**2
    return float((squares / total) ** 0.5)


def _config(model: Any, token_id: int, quantization: dict[str, Any] | None) -> dict[str, Any]:
    flat = apple_config(model.config)
    for key in ("image_token_id", "rope_scaling", "vision_config"):
        flat.pop(key, None)
    flat |= {"eos_token_id": model.generation_config.eos_token_id, "image_token_index": token_id}
    if quantization is not None:
        flat["quantization"] = {key: quantization[key] for key in ("group_size", "bits")}
    return flat


def _processor_files(side: int) -> dict[str, dict[str, Any]]:
    return {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "image_mean": [0.0, 0.0, 0.0],
            "image_std": [1.0, 1.0, 1.0],
        },
        "processor_config.json": {"processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": 64},
    }


def _name_tokenizer(out: Path) -> None:
    """Call the tokenizer by the name that Swift's tokenizers know, and see that it knows <image>."""
    path = out / "tokenizer_config.json"
    write_json(path, read_json(path) | {"tokenizer_class": "Qwen2Tokenizer"})
    if all(token["content"] != "<image>" for token in read_json(out / "tokenizer.json")["added_tokens"]):
        raise ValueError("tokenizer.json has no <image>, which Apple's app needs. Please report it.")


def _limits(side: int, channels: int, source: Source) -> list[str]:
    limits = [
        "The app cuts pictures to their centred square instead of padding them, as this model was trained with, and "
        "puts the picture behind the question instead of in front of it. Answers differ from those of this package.",
        "The app takes one picture a question.",
    ]
    if side != _APP_SIZE or channels != _APP_CHANNELS:
        limits.append(
            f"The app expects features of the shape [1, {(_APP_SIZE // 64) ** 2}, {_APP_CHANNELS}] and stops at any "
            f"other. This model's are [1, {(side // 64) ** 2}, {channels}]: change the shape in `FastVLM.swift` "
            "wherever it stands."
        )
    if source.config.image_aspect_ratio == "anyres":
        limits.append("There is no AnyRes in the app: each picture is seen once.")
    return limits
