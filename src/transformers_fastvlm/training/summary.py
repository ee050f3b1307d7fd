# SPDX-License-Identifier: Apache-2.0
"""A short summary of a run, printed before it starts."""

import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from .arguments import autocast_dtype
from .callbacks import iter_rows
from .memory import estimate_memory, readable_size
from .parts import describe_parts
from .recipes import Recipe

__all__ = ["summary"]


def summary(
    recipe: Recipe, arguments: TrainingArguments, model: nn.Module, train: Any, evaluation: Any, collator: Any
) -> Iterator[str]:
    """Yield lines: the recipe, trained parts and learning rates, the data, the updates, and the memory estimate."""
    yield f"{recipe.name}: {recipe.description}" if recipe.description else recipe.name
    yield f"model    {recipe.model.path or 'new'}, {_encoder(model)}"
    rates = recipe.learning_rates()
    for part, (total, trainable) in describe_parts(model).items():
        trained = f"{trainable:,} trained, learning rate {rates[part]:g}" if trainable else "frozen"
        yield f"  {part:<15}{total:>15,} parameters, {trained}"
    yield f"data     {_size(train)}, conversation {recipe.data.conversation}" + (
        f"; evaluated on {_size(evaluation)}" if evaluation is not None else ""
    )
    yield f"update   {_update(arguments, train)}"
    yield f"compute  {_compute(recipe, arguments)}"
    yield f"memory   {_memory(recipe, arguments, model, train, collator)}"
    yield f"output   {arguments.output_dir}"


def _encoder(model: Any) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    encoder = base.model.vision_tower
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    frozen = all(getattr(module, "frozen", False) for module in norms)
    size = encoder.config.image_size
    return (
        f"{size}x{size} pixels, encoder in {'merged' if encoder.config.reparameterized else 'train-time'} form, "
        f"BatchNorm statistics {'frozen' if frozen else 'updated'}"
    )


def _size(dataset: Any) -> str:
    if not hasattr(dataset, "__len__"):
        return "a stream"
    rows = f"{len(dataset):,} rows"
    skipped = getattr(getattr(dataset, "captions", dataset), "skipped", ())
    return f"{rows} ({len(skipped):,} skipped because of their images)" if skipped else rows


def _update(arguments: TrainingArguments, train: Any) -> str:
    per_device, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    batch = per_device * arguments.world_size * accumulated
    text = f"{batch} rows = {per_device} x {arguments.world_size} devices x {accumulated} accumulated"
    if arguments.max_steps > 0:
        return f"{text}; {arguments.max_steps:,} updates"
    if hasattr(train, "__len__"):
        each = math.ceil(math.ceil(len(train) / (per_device * arguments.world_size)) / accumulated)
        return f"{text}; {math.ceil(each * arguments.num_train_epochs):,} updates"
    return text


def _compute(recipe: Recipe, arguments: TrainingArguments) -> str:
    autocast = autocast_dtype(arguments)
    text = f"weights {recipe.model.dtype}"
    if autocast is not None:
        text += f", autocast to {str(autocast).removeprefix('torch.')}"
    if recipe.train.gradient_checkpointing:
        text += ", gradient checkpointing"
    devices = torch.cuda.device_count() if arguments.device.type == "cuda" else 1
    if devices > 1 and arguments.world_size == 1:
        text += f"; one of {devices} GPUs (accelerate launch -m transformers_fastvlm train … uses all)"
    return f"{text}, on {arguments.device.type}"


def _memory(recipe: Recipe, arguments: TrainingArguments, model: nn.Module, train: Any, collator: Any) -> str:
    batch = collator(list(itertools.islice(iter_rows(train), arguments.per_device_train_batch_size)))
    try:
        estimate = estimate_memory(
            model,
            batch,
            optimizer=str(getattr(arguments.optim, "value", arguments.optim)),
            autocast=autocast_dtype(arguments),
            gradient_checkpointing=recipe.train.gradient_checkpointing,
            accumulates=arguments.gradient_accumulation_steps > 1,
        )
    except (RuntimeError, NotImplementedError) as error:
        return f"no estimate for this model ({str(error).splitlines()[0]})"
    rows, length = batch["input_ids"].shape
    text = f"{estimate}, for {rows} rows of {length} tokens (the first batch)"
    there = _installed(arguments)
    return text if there is None else f"{text}; the device has {readable_size(there)}"


def _installed(arguments: TrainingArguments) -> int | None:
    if arguments.device.type == "cuda":
        return int(torch.cuda.mem_get_info(arguments.device)[1])
    if arguments.device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
