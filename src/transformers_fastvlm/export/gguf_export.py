# SPDX-License-Identifier: Apache-2.0
"""The target `gguf`: the language model for llama.cpp, and the encoder for onnxruntime.

    OUT/config.json, generation_config.json, tokenizer and processor files
    OUT/language_model-{q8_0,float32,float16,q4_0,q4_k_m}.gguf
    OUT/vision_encoder.onnx      pixel_values (images, 3, height, width) to image_features (images, tokens, hidden)

llama.cpp has no FastViT. It takes image features as input embeddings, so that the encoder runs beside it.
"""

import copy
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import FastVLMProcessor
from ..checkpoint_files import read_json
from ..checkpoints.files import write_json
from ..engines.llama_library import INSTALL, library, quantize_file
from ..inference import fuse
from ..storage.digests import file_digest
from .export_source import Source
from .gguf_files import OWN_KEYS, check_language_model, kind_of_dtype, write_gguf
from .llamacpp_check import greedy, is_installed
from .onnx_files import NOT_OF_THE_TOKENIZER
from .onnx_graphs import save_graph, vision_graph
from .reference import Reference, reference, relative_error
from .targets import ExportOptions, Report, how_to_run

__all__ = ["LANGUAGE_MODEL", "VISION_ENCODER", "write"]

LANGUAGE_MODEL = "language_model-{}.gguf"
VISION_ENCODER = "vision_encoder.onnx"
LARGEST_FLOAT32_ERROR = 1e-4
_BY_LLAMACPP = {"q4_k_m": "MOSTLY_Q4_K_M"}


def write(source: Source, out: Path, options: ExportOptions) -> Report:
    """Write the directory. See `targets` for the arguments."""
    for precision in options.precisions:
        if precision in _BY_LLAMACPP:
            library(f"The precision {precision}")
    check_language_model(source.config)
    size = options.sizes[0] if options.sizes else source.image_size
    model = source.model("auto")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{source.directory} is quantized; export the original checkpoint instead.")
    _write_files(source, model, out, size)
    own = _own_values(source, out, size)
    for precision in options.precisions:
        path = out / LANGUAGE_MODEL.format(precision)
        options.say(f"writing {path.name}")
        _write_language_model(source, model, path, precision, own)
    options.say(f"writing {VISION_ENCODER}")
    _write_encoder(model, out / VISION_ENCODER)
    del model
    expected = reference(source, size)
    options.say("checking the encoder in onnxruntime")
    features = _image_features(out / VISION_ENCODER, expected.pixel_values.numpy())
    errors = {"float32: image features": relative_error(features, expected.features)}
    if is_installed():
        for precision in options.precisions:
            options.say(f"checking {precision} in llama.cpp")
            errors[f"{precision}: logits"] = _logits_error(out, precision, features, expected)
    return _report(source, options, errors)


def _write_language_model(source: Source, model: Any, path: Path, precision: str, own: dict[str, int | str]) -> None:
    """Write one precision; llama.cpp's own types are made from a file in the checkpoint's dtype."""
    if precision not in _BY_LLAMACPP:
        write_gguf(path, model, source, precision, own)
        return
    import gguf

    original = path.with_suffix(".original")
    write_gguf(original, model, source, kind_of_dtype(model.lm_head.weight.dtype), own)
    quantize_file(original, path, gguf.LlamaFileType[_BY_LLAMACPP[precision]], torch.get_num_threads())
    original.unlink()


def _write_encoder(model: Any, path: Path) -> None:
    """Write encoder and projector, merged and in float32, and leave the model without them."""
    model.model.vision_tower.float().reparameterize()
    model.model.multi_modal_projector.float()
    fuse(model)
    save_graph(vision_graph(model), path, external_data=None)


def _write_files(source: Source, model: Any, out: Path, size: int) -> None:
    """Write what `FastVLMProcessor` and `AutoConfig` read, for one square of `size` pixels an image."""
    config = copy.deepcopy(source.config)
    config.vision_config.image_size = size
    config.vision_config.reparameterized = True
    options: dict[str, Any] = {"size": {"height": size, "width": size}}
    if config.image_aspect_ratio == "anyres":
        config.image_aspect_ratio, config.image_grid_pinpoints, config.mm_patch_merge_type = "pad", None, "flat"
        options["image_aspect_ratio"] = "pad"
    processor = FastVLMProcessor.from_pretrained(source.directory, **options)
    processor.mm_patch_merge_type = config.mm_patch_merge_type
    processor.save_pretrained(out)
    content = read_json(out / "tokenizer_config.json")
    for key in NOT_OF_THE_TOKENIZER:
        content.pop(key, None)
    write_json(out / "tokenizer_config.json", content)
    model.generation_config.save_pretrained(out)
    config.save_pretrained(out)


def _own_values(source: Source, out: Path, size: int) -> dict[str, int | str]:
    """Return the values of `OWN_KEYS`."""
    config = source.config
    side = size // config.vision_config.stride
    values = (
        source.processor.image_token_id,
        side * side,
        config.text_config.hidden_size,
        file_digest(out / "config.json"),
    )
    return dict(zip(OWN_KEYS, values, strict=True))


def _image_features(path: Path, pixel_values: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {"pixel_values": pixel_values})
    return features


def _logits_error(out: Path, precision: str, features: np.ndarray, expected: Reference) -> float:
    """Run a file on the image features and compare the first logits.

    Raises:
        RuntimeError: the logits are not finite, or the float32 file differs from PyTorch.
    """
    place = expected.prompt.index(expected.image_token_id)
    parts = [expected.prompt[:place], features[0], expected.prompt[place + 1 :]]
    path = out / LANGUAGE_MODEL.format(precision)
    logits, answer = greedy(path, parts, len(expected.answer))
    error = relative_error(logits, expected.logits[-1])
    exact = precision != "float32" or (error <= LARGEST_FLOAT32_ERROR and answer == expected.answer)
    if not np.isfinite(error) or not exact:
        raise RuntimeError(
            f"{path.name} differs from the model in llama.cpp: relative error {error:.2e} of the logits, answer "
            f"{list(answer)} instead of {list(expected.answer)}. Please report it."
        )
    return error


def _report(source: Source, options: ExportOptions, errors: dict[str, float]) -> Report:
    checked = f"onnxruntime {importlib.metadata.version('onnxruntime')}"
    notes: tuple[str, ...] = ()
    if is_installed():
        checked = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')} and {checked} on the CPU"
    else:
        checked += " on the CPU (the encoder only: llama-cpp-python is not installed)"
        notes = (f"The language model was not run. With {INSTALL} the export checks it.",)
    return Report(
        checked_in=checked,
        errors=errors,
        how_to_run=how_to_run("gguf", precision=options.precisions[0]),
        limits=tuple(_limits(source)),
        notes=notes,
    )


def _limits(source: Source) -> list[str]:
    limits = [
        "llama.cpp's own programs, Ollama and LM Studio cannot read images with FastVLM, since they have no FastViT. "
        "They run the language model on text.",
        "A GGUF file and vision_encoder.onnx belong together: the image features are input embeddings of this language "
        "model only.",
    ]
    if source.config.image_aspect_ratio == "anyres":
        limits.append("The checkpoint cuts large images into tiles (AnyRes); these files use one padded square.")
    return limits
