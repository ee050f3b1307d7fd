# SPDX-License-Identifier: Apache-2.0
"""The target `mlx`: a directory that mlx-vlm loads as its `fastvlm`.

A tensor's values change only in type and order: MLX keeps channels last. mlx-vlm takes the encoder's sizes from its own
constants, and a language model with the biases of Qwen2; a Llama gets zeros there, which is the same function.
Source: names and shapes of the parameters of mlx-vlm 0.7's `fastvlm`.
"""

import contextlib
import importlib.metadata
import itertools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.configs import apple_config, native_processor_files
from ..checkpoints.files import write_json
from ..configuration_fastvlm import FastViTHDConfig
from .export_source import Source
from .mlx_weights import quantization_of, renamed, write_weights
from .reference import Reference, merged_model, reference, relative_error
from .targets import ExportOptions, Report, how_to_run

__all__ = ["IMAGE_TOKEN_INDEX", "check_language_model", "encoder_of", "greedy_answer", "save_tokenizer", "write"]

MODULES: tuple[tuple[str, str], ...] = (
    ("model.vision_tower.patch_embed.", "vision_tower.vision_model.patch_embed.blocks."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.linear_1.", "mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "mm_projector.2."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""See `renamed`."""

IMAGE_TOKEN_INDEX = -200
"""What stands in a picture's place for mlx-vlm. With any other number in config.json it would leave the picture out."""
_FIXED = ("attention_head_dim", "hidden_act", "multi_scale", "layer_norm_eps", "batch_norm_eps", "num_channels")
_TOLERANCE = 1e-3


def write(source: Source, out: Path, options: ExportOptions) -> Report:
    """Write the directory. See `targets`."""
    _check_encoder(source)
    check_language_model(source, "mlx-vlm")
    quantization = quantization_of(options.precision)
    dtype = "bfloat16" if quantization else options.precision
    model = merged_model(source, "auto")
    config = _config(source, model, quantization)
    generation = model.generation_config
    tensors = {renamed(name, MODULES, "mlx-vlm"): _arranged(name, tensor) for name, tensor in _tensors(model).items()}
    del model
    options.say(f"writing {len(tensors)} tensors")
    write_weights(out, tensors, dtype, quantization, quantizable="language_model.")
    del tensors
    generation.save_pretrained(out)
    save_tokenizer(source, out)
    write_json(out / "preprocessor_config.json", _preprocessor(source))
    write_json(out / "config.json", config)
    options.say("running the files in mlx-vlm")
    errors = _errors(source, out, options.precision, reference(source))
    return Report(
        checked_in=f"mlx-vlm {importlib.metadata.version('mlx-vlm')} on MLX {importlib.metadata.version('mlx')}",
        errors=errors,
        how_to_run=_how_to_run(source),
        limits=tuple(_limits(source, options.precision)),
        library_name="mlx",
    )


def _check_encoder(source: Source) -> None:
    vision, published = source.config.vision_config, FastViTHDConfig()
    different = [field for field in _FIXED if getattr(vision, field) != getattr(published, field)]
    if different:
        found = ", ".join(f"{field} {getattr(vision, field)!r}" for field in different)
        raise ValueError(
            f"The encoder has {found}; mlx-vlm knows only the published model's. Export to 'onnx' instead."
        )


def check_language_model(source: Source, runtime: str) -> None:
    """Raise ValueError unless the language model is one that a Qwen2 of the sizes in config.json can express."""
    text = source.config.text_config
    wrong = {
        "model_type": text.model_type if text.model_type not in ("qwen2", "llama") else None,
        "use_sliding_window": getattr(text, "use_sliding_window", None) or None,
        "attention_bias": getattr(text, "attention_bias", None) or None,
        "mlp_bias": getattr(text, "mlp_bias", None) or None,
    }
    head_dim = getattr(text, "head_dim", None)
    if head_dim is not None and head_dim != text.hidden_size // text.num_attention_heads:
        wrong["head_dim"] = head_dim
    found = ", ".join(f"{name} {value!r}" for name, value in wrong.items() if value is not None)
    if found:
        raise ValueError(
            f"The language model has {found}; {runtime} expects Qwen2 or Llama, with full attention and heads of "
            "hidden_size / num_attention_heads channels. Export to 'onnx' or 'executorch' instead."
        )


def save_tokenizer(source: Source, out: Path) -> None:
    """Write the tokenizer's files, tokenizer.json among them, with the chat template that places pictures."""
    processor = source.processor
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(out)


def _tensors(model: Any) -> dict[str, Tensor]:
    """Return what the model is made of, by our names, with the parts that mlx-vlm always has."""
    config = model.config
    vision, text = config.vision_config, config.text_config
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".num_batches_tracked")}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    # Nobody has a use for the learned newline where pictures are not cut into tiles.
    tensors.pop("model.image_newline", None)
    like = tensors["model.vision_tower.conv_exp.reparam_conv.weight"]
    tensors.setdefault("model.vision_tower.head.proj", like.new_zeros((vision.num_features, 1)))
    if text.model_type == "llama":
        for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
            tensors[name.removesuffix("weight") + "bias"] = tensors[name].new_zeros(tensors[name].shape[0])
    return tensors


def _arranged(name: str, tensor: Tensor) -> Tensor:
    """Return an encoder's tensor with its channels last, and any other as it is."""
    if not name.startswith("model.vision_tower."):
        return tensor
    if tensor.ndim == 4:
        return tensor.permute(0, 2, 3, 1)
    return tensor.permute(1, 2, 0) if ".layer_scale" in name else tensor


def _config(source: Source, model: Any, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Return config.json: Apple's, as mlx-vlm reads it."""
    config = model.config
    flat = apple_config(config)
    flat.pop("image_token_id", None)
    flat |= {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "eos_token_id": model.generation_config.eos_token_id,
        "image_aspect_ratio": "pad",
        "image_token_index": IMAGE_TOKEN_INDEX,
        "tokenizer_model_max_length": config.text_config.max_position_embeddings,
        "vision_config": {
            "model_type": "llava_qwen2",
            "image_size": source.image_size,
            "projection_dim": config.vision_config.projection_dim or 1,
        },
    }
    if quantization is not None:
        flat |= {"quantization": quantization, "quantization_config": quantization}
    return flat


def _preprocessor(source: Source) -> dict[str, Any]:
    """Return preprocessor_config.json, as mlx-vlm's image processor and Apple's app read it."""
    content = native_processor_files(source.config)["preprocessor_config.json"]
    del content["do_pad"]
    return content | {"image_processor_type": "FastVLMImageProcessor", "processor_class": "FastVLMProcessor"}


@contextlib.contextmanager
def encoder_of(source: Source) -> Iterator[None]:
    """Let mlx-vlm build an encoder of the checkpoint's sizes, in place of the constants that it has for them."""
    from mlx_vlm.models.fastvlm.config import VisionConfig

    vision = source.config.vision_config
    saved = VisionConfig.layers, VisionConfig.embed_dims, VisionConfig.mlp_ratios
    VisionConfig.layers, VisionConfig.embed_dims = list(vision.depths), list(vision.hidden_sizes)
    VisionConfig.mlp_ratios = [vision.mlp_ratio] * len(vision.depths)
    try:
        yield
    finally:
        VisionConfig.layers, VisionConfig.embed_dims, VisionConfig.mlp_ratios = saved


def _image_features(model: Any, pixel_values: Any) -> Any:
    """Return (batch, tokens, hidden) that mlx-vlm's encoder and projector make of (batch, 3, height, width)."""
    stem = model.vision_tower.vision_model.patch_embed.blocks[0].reparam_conv.weight
    _, encoded, _ = model.vision_tower(pixel_values.astype(stem.dtype).transpose(0, 2, 3, 1))
    return model.mm_projector(encoded.reshape(encoded.shape[0], -1, encoded.shape[-1]))


def greedy_answer(
    model: Any, input_ids: list[int], pixel_values: Any, max_tokens: int, ends: Collection[int] = (), **kwargs: Any
) -> list[int]:
    """Return the token ids that mlx-vlm generates greedily.

    Args:
        model: as mlx-vlm loads it.
        input_ids: with one `IMAGE_TOKEN_INDEX` in the picture's place.
        pixel_values: MLX array (1, 3, height, width).
        max_tokens: most tokens.
        ends: ids that end the answer, and are not returned.
        kwargs: more of mlx-vlm's `generate_step`.
    """
    import mlx.core as mx
    from mlx_vlm.generate import generate_step

    ids = mx.array([input_ids])
    steps = generate_step(ids, model, pixel_values, None, max_tokens=max_tokens, temperature=0.0, **kwargs)
    return list(itertools.takewhile(lambda token: token not in ends, (int(token) for token, _ in steps)))


def _errors(source: Source, directory: Path, precision: str, expected: Reference) -> dict[str, float]:
    """Run the directory in mlx-vlm and compare."""
    import mlx.core as mx
    import numpy as np
    from mlx_vlm.utils import load_model

    with encoder_of(source):
        model = load_model(directory)
    pixel_values = mx.array(expected.pixel_values.numpy())
    features = _image_features(model, pixel_values)
    ids = expected.prompt_with([IMAGE_TOKEN_INDEX])
    embeds = model.get_input_embeddings(mx.array([ids]), pixel_values).inputs_embeds
    logits = model.language_model(None, inputs_embeds=embeds).logits[0]
    found = {"image features": (features, expected.features), "logits": (logits, expected.logits)}
    errors = {
        f"{precision}: {name}": relative_error(torch.from_numpy(np.array(array.astype(mx.float32))), tensor)
        for name, (array, tensor) in found.items()
    }
    if not all(error < float("inf") for error in errors.values()):
        raise ValueError(
            f"In mlx-vlm the model gives values that are not finite in {precision}: activations at the end of the "
            "encoder pass the largest number of float16. Export as bfloat16, q8 or q4 instead."
        )
    if precision == "float32":
        answer = greedy_answer(model, ids, pixel_values, len(expected.answer))
        if max(errors.values()) > _TOLERANCE or tuple(answer) != expected.answer:
            raise ValueError(f"mlx-vlm computes another function than this package: {errors}. Please report it.")
    return errors


def _limits(source: Source, precision: str) -> list[str]:
    limits = [
        "One picture a question: with two or more, mlx-vlm puts the text at the wrong places between them.",
        "mlx-vlm pads every picture to a black square, and loses up to one of 255 a value in doing so.",
        "mlx-vlm takes a picture whose largest value is 1 of 255 or less for one that is scaled already, and so sees a "
        "nearly black picture as a bright one.",
        "`image_token_index` in config.json must stay -200, and `model_type` llava_qwen2: with others mlx-vlm leaves "
        "the picture out without a word.",
    ]
    config = source.config
    if precision == "float16":
        limits.append("The encoder is computed in float16 here, where this package computes its end in float32.")
    if config.image_aspect_ratio != "pad":
        limits.append(f"This checkpoint has image_aspect_ratio {config.image_aspect_ratio!r}; mlx-vlm pads instead.")
    if not source.has_published_encoder:
        limits.append("The encoder is not of the published size: mlx-vlm has to be told its sizes, as shown above.")
    return limits


def _how_to_run(source: Source) -> str:
    if source.has_published_encoder:
        return how_to_run("mlx")
    vision = source.config.vision_config
    ratios = [vision.mlp_ratio] * len(vision.depths)
    return how_to_run("mlx-small", depths=list(vision.depths), widths=list(vision.hidden_sizes), ratios=ratios)
