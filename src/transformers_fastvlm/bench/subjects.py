# SPDX-License-Identifier: Apache-2.0
"""The models to measure, each with its preprocessing, encoder and projector."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from .. import FastVLMConfig, kernels
from .._optional import needs
from ..checkpoints.embedded import resolve_model
from ..images.anyres import scaled_pinpoints, unpadded_grid
from .cases import LLAVA_ONEVISION_SIDE, NATIVE, SIZES, Case, fastvlm_config
from .random_weights import native_twin, random_model

__all__ = ["Subject", "build"]

Inputs = dict[str, Any]

_QUESTION = "What is in this picture? Answer in one sentence."
_TEXT_IDS = 256
_BEFORE_IMAGE = 1
_PROJECTORS = ("multi_modal_projector", "connector", "aligner", "mlp1", "merger", "embed_vision")

_SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
_ONEVISION_TEXT: dict[str, Any] = {"vocab_size": 152000}
"""Differences from the language model of FastVLM-0.5B."""


@dataclass
class Subject:
    """A model that is ready to be measured.

    Attributes:
        model: on its device, in evaluation mode.
        preprocess: from image files to the model's inputs, on the CPU.
        weights: "random" or "checkpoint".
        encoder, projector: parts of the model; None if no part has a known name.
    """

    model: Any
    preprocess: Callable[[list[str]], Inputs]
    weights: str
    encoder: nn.Module | None = None
    projector: nn.Module | None = None


def build(case: Case, options: dict[str, Any]) -> Subject:
    """Build the model of a case.

    Args:
        options: `Options.as_dict()`.

    Raises:
        ImportError: an optional package is missing; the message names it.
        ValueError, OSError: the checkpoint cannot be loaded.
    """
    device, dtype = torch.device(options["device"]), getattr(torch, case.dtype)
    makers = {"fastvlm": _fastvlm, NATIVE: _native, "llava-onevision": _llava_onevision, "other": _other}
    subject = makers[case.kind](case, options, dtype, device)
    if case.fuse:
        from ..inference import fuse

        subject.model = fuse(subject.model) or subject.model
    encoder = subject.model.get_encoder(modality="image")
    subject.encoder = None if encoder in (subject.model, getattr(subject.model, "model", None)) else encoder
    subject.projector = _projector(subject.model)
    return subject


def _fastvlm(case: Case, options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Subject:
    config = _config(case)
    side = case.resolution
    assert side is not None
    image_options: dict[str, Any] = {"size": side, "image_aspect_ratio": config.image_aspect_ratio}
    if config.image_aspect_ratio == "anyres":
        own = config.vision_config.image_size
        image_options["image_grid_pinpoints"] = scaled_pinpoints(config.image_grid_pinpoints, own, side)
    processor = _image_processor("FastVLMImageProcessor", options)(**image_options)

    def preprocess(files: list[str]) -> Inputs:
        inputs = dict(processor(files, return_tensors="pt", **_place(options)))
        stride = config.vision_config.stride
        counts = [(side // stride) ** 2] * len(files)
        if "image_sizes" in inputs:
            sizes = inputs["image_sizes"].tolist()
            counts = [processor.get_number_of_image_tokens(*size, config.mm_patch_merge_type) for size in sizes]
        return inputs | _prompts(counts, config.image_token_id, options["prompt_tokens"])

    if case.source in SIZES:
        model = random_model(config, dtype, device, options["attn_implementation"])
        kernels.speed_up_linear_layers(model)  # as from_pretrained does
        return Subject(model, preprocess, "random")
    return Subject(_load(case.source, dtype, device, options), preprocess, "checkpoint")


def _native(case: Case, options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Subject:
    """Transformers' own `fast_vlm` of the same shape, with its image processor and random weights."""
    with needs("timm", "--against native", 'pip install "transformers-fastvlm[bench]"'):
        import timm  # noqa: F401
    from ..checkpoints.configs import native_processor_files

    config = _config(case)
    config.vision_config.image_size = case.resolution
    native = native_twin(config)
    described = native_processor_files(config)["preprocessor_config.json"]
    names = ("image_processor_type", "processor_class")
    processor = _image_processor("LlavaImageProcessor", options)(
        **{name: value for name, value in described.items() if name not in names}
    )

    def preprocess(files: list[str]) -> Inputs:
        images = [_opened(file) for file in files]
        inputs = {"pixel_values": processor(images, return_tensors="pt", **_place(options))["pixel_values"]}
        counts = [native.image_seq_length] * len(files)
        return inputs | _prompts(counts, config.image_token_id, options["prompt_tokens"])

    model = random_model(native, dtype, device, options["attn_implementation"])
    return Subject(model, preprocess, "random")


def _llava_onevision(case: Case, options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Subject:
    """LLaVA-OneVision-0.5B: SigLIP so400m at 384 px on an overview and 3 x 3 tiles, and Qwen2-0.5B.

    Sizes as in the configuration of the published checkpoint; random weights.
    """
    from transformers import LlavaOnevisionConfig

    preset: Any = FastVLMConfig.from_preset("0.5b")
    tile, patch = _SIGLIP["image_size"], _SIGLIP["patch_size"]
    grid = [[LLAVA_ONEVISION_SIDE, LLAVA_ONEVISION_SIDE]]
    config = LlavaOnevisionConfig(
        text_config=preset.text_config.to_dict() | _ONEVISION_TEXT,
        vision_config=dict(_SIGLIP),
        image_grid_pinpoints=grid,
        tie_word_embeddings=True,
    )
    processor = _image_processor("LlavaOnevisionImageProcessor", options)(
        size={"height": tile, "width": tile}, image_grid_pinpoints=grid, do_pad=True
    )

    def preprocess(files: list[str]) -> Inputs:
        images = [[_opened(file)] for file in files]
        inputs = dict(processor(images, return_tensors="pt", **_place(options)))
        counts = []
        for size in inputs["image_sizes"].tolist():
            # The whole image, then the tiles without padding and with a newline after each row.
            side = tile // patch
            tiles = side * (LLAVA_ONEVISION_SIDE // tile)
            _, _, height, width = unpadded_grid(size, tiles, tiles)
            counts.append(side * side + height * (width + 1))
        allowed = ("pixel_values", "image_sizes", "batch_num_images")
        inputs = {name: value for name, value in inputs.items() if name in allowed}
        return inputs | _prompts(counts, config.image_token_id, options["prompt_tokens"])

    return Subject(random_model(config, dtype, device, options["attn_implementation"]), preprocess, "random")


def _other(case: Case, options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Subject:
    """Any image-text-to-text model of Transformers, with its processor for image and question."""
    processor = AutoProcessor.from_pretrained(resolve_model(case.source))

    def preprocess(files: list[str]) -> Inputs:
        content = [[{"type": "image", "path": file}, {"type": "text", "text": _QUESTION}] for file in files]
        conversations = [[{"role": "user", "content": parts}] for parts in content]
        inputs = processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return dict(inputs)

    return Subject(_load(case.source, dtype, device, options), preprocess, "checkpoint")


def _config(case: Case) -> Any:
    config = fastvlm_config(case.source)
    if case.source not in SIZES and config.image_token_id is None:
        raise ValueError(f"{case.source!r} has no image_token_id and no tokenizer; add the tokenizer files to it.")
    return config


def _load(source: str, dtype: torch.dtype, device: torch.device, options: dict[str, Any]) -> Any:
    attention = options["attn_implementation"]
    chosen = {"attn_implementation": attention} if attention else {}
    model = AutoModelForImageTextToText.from_pretrained(resolve_model(source), dtype=dtype, **chosen)
    return model.to(device).eval().requires_grad_(False)


def _image_processor(name: str, options: dict[str, Any]) -> Any:
    """Return an image processor class by name, ours or Transformers', for the chosen backend."""
    import transformers

    import transformers_fastvlm

    package = transformers_fastvlm if name.startswith("FastVLM") else transformers
    return getattr(package, name if options["image_backend"] == "torchvision" else f"{name}Pil")


def _place(options: dict[str, Any]) -> dict[str, Any]:
    """Return the device for resizing: torchvision can use the model's device, Pillow only the CPU."""
    return {"device": options["device"]} if options["image_backend"] == "torchvision" else {}


def _opened(file: str) -> Any:
    """Return the decoded image, since Transformers' image processors take no paths."""
    from ..images.reading import read_file

    return read_file(file, f"the image file {file!r}")


def _prompts(image_tokens: list[int], image_token_id: int, text_tokens: int) -> Inputs:
    """Return prompts of one image and `text_tokens` tokens of text, padded on the left to one length."""
    texts = torch.arange(text_tokens) % _TEXT_IDS
    longest = max(image_tokens) + text_tokens
    rows, masks = [], []
    for count in image_tokens:
        image = torch.full((count,), image_token_id)
        padding = torch.zeros(longest - count - text_tokens, dtype=torch.long)
        rows.append(torch.cat((padding, texts[:_BEFORE_IMAGE], image, texts[_BEFORE_IMAGE:])))
        masks.append(torch.cat((padding, torch.ones(count + text_tokens, dtype=torch.long))))
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


def _projector(model: Any) -> nn.Module | None:
    for owner in (getattr(model, "model", None), model):
        for name in _PROJECTORS:
            found = getattr(owner, name, None)
            if isinstance(found, nn.Module):
                return found
    return None
