# SPDX-License-Identifier: Apache-2.0
"""Loading of a recipe's model and data sections: the model with its processor, the data sets and the collator."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import FastVLMConfig, FastVLMForConditionalGeneration, FastVLMProcessor
from ..checkpoints.embedded import resolve_model
from .models import new_model, torch_dtype
from .questions import AskedCaptions, ask, load_questions
from .recipes import DataSection, Recipe

__all__ = ["load_data", "load_model", "prepare_encoder"]

SCENES = "scenes"


def load_model(recipe: Recipe) -> tuple[FastVLMForConditionalGeneration, FastVLMProcessor]:
    """Load or create the model of a recipe, with its processor, at the recipe's resolution.

    Raises:
        OSError: a directory or repository does not exist.
        ValueError: neither `model.path` nor `model.new` is set, or a value is invalid.
    """
    section = recipe.model
    if section.new is not None:
        fields = {"image_size": section.image_size, **section.new}
        try:
            return new_model(**fields, dtype=section.dtype)
        except TypeError as error:
            raise ValueError(f"model.new does not fit new_model ({error}); see `fastvlm new --help`.") from error
    if section.path is None:
        raise ValueError(
            "model.path is not set: name the directory or hub repository of the model to train, as in "
            "model.path=apple/FastVLM-0.5B. `fastvlm new` creates one from an encoder and a language model."
        )
    source = resolve_model(section.path)
    config = FastVLMConfig.from_pretrained(source)
    options: dict[str, Any] = {}
    if section.image_size is not None:
        config.vision_config.image_size = section.image_size
        options["size"] = section.image_size
    dtype = torch_dtype(section.dtype)
    quantized: dict[str, Any] = {}
    if recipe.lora is not None and recipe.lora.quantization is not None:
        from .lora import quantization_config

        settings = quantization_config(recipe.lora.quantization, compute_dtype=dtype)
        on_device = torch.accelerator.is_available() and not recipe.arguments.get("use_cpu")
        device: int | str = int(os.environ.get("LOCAL_RANK", "0")) if on_device else "cpu"
        quantized = {"quantization_config": settings, "device_map": {"": device}}
    model = FastVLMForConditionalGeneration.from_pretrained(source, config=config, dtype=dtype, **quantized)
    processor = FastVLMProcessor.from_pretrained(source, **options)
    return model, processor


def prepare_encoder(model: FastVLMForConditionalGeneration, recipe: Recipe) -> None:
    """Set the form of the encoder, its BatchNorm and its stochastic depth as the recipe says.

    BatchNorm statistics of a frozen encoder are always frozen.
    """
    encoder, section = model.model.vision_tower, recipe.model
    if section.merge_encoder:
        encoder.eval().reparameterize()
    own = encoder.config.freeze_batch_norm
    choices = (section.freeze_batch_norm, own, encoder.config.reparameterized)
    frozen = next(choice for choice in choices if choice is not None)
    trains = "vision_tower" in (*recipe.train.parts, *(recipe.lora.parts if recipe.lora else ()))
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.frozen = frozen or not trains  # type: ignore[assignment]
    if section.drop_path_rate is not None:
        blocks = [module for module in encoder.modules() if hasattr(module, "drop_path")]
        for index, block in enumerate(blocks):
            block.drop_path.rate = section.drop_path_rate * index / max(len(blocks) - 1, 1)


def load_data(section: DataSection, processor: FastVLMProcessor) -> tuple[Any, Any, Any]:
    """Return the training set, the evaluation set or None, and the collator.

    Raises:
        OSError: a file or repository does not exist.
        ValueError: `data.source` is not set, or a row or an option is invalid.
    """
    from ..data import FastVLMDataCollator

    if section.source is None:
        raise ValueError(
            "data.source is not set: name a LLaVA file, a data set on the hub, or scenes, as in data.source=train.json."
        )
    collator = FastVLMDataCollator(processor, conversation=section.conversation, max_length=section.max_length)
    train = _dataset(section, section.source, section.options)
    evaluation = None
    if section.eval_source is not None:
        evaluation = _dataset(section, section.eval_source, section.eval_options)
    return train, evaluation, collator


def _dataset(section: DataSection, source: Any, options: Mapping[str, Any]) -> Any:
    dataset = _scenes(options) if source == SCENES else _rows(section, source, options)
    if section.questions is None:
        return dataset
    questions = load_questions(section.questions)
    if hasattr(dataset, "__len__"):
        return AskedCaptions(dataset, questions)
    return dataset.map(ask, fn_kwargs={"questions": questions})


def _scenes(options: Mapping[str, Any]) -> Any:
    from ..data.scenes import SceneDataset

    try:
        return SceneDataset(**options)
    except TypeError as error:
        raise ValueError(f"The options of scenes are invalid ({error}); see SceneDataset.") from error


def _rows(section: DataSection, source: Any, options: Mapping[str, Any]) -> Any:
    from ..data import load

    shared: dict[str, Any] = {
        "image_folder": section.image_folder,
        "on_bad_image": section.on_bad_image,
        "do_exif_transpose": section.do_exif_transpose,
        "alpha_background": section.alpha_background,
        "max_pixels": section.max_pixels,
    }
    if section.streaming:
        shared["streaming"] = True
    try:
        return load(source, **{**shared, **options})
    except TypeError as error:
        raise ValueError(f"The options of {source!r} are invalid ({error}); see data.load.") from error
