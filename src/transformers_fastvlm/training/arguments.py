# SPDX-License-Identifier: Apache-2.0
"""From a recipe to `TrainingArguments`: settings that depend on the devices, and settings that FastVLM always needs."""

import dataclasses
import importlib
import os
from typing import Any

import torch
from transformers import TrainingArguments

from .._optional import needs
from .recipes import Recipe

__all__ = ["autocast_dtype", "training_arguments"]


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Return the `TrainingArguments` of a recipe, on the devices of this process group.

    Raises:
        ImportError: a package that training needs is missing.
        ValueError: the global batch is not a multiple of the rows of one step on all devices, or `TrainingArguments`
            refuses a value.
    """
    with needs("accelerate", "Training", 'pip install "transformers-fastvlm[training]"'):
        importlib.import_module("accelerate")
    given = dict(recipe.arguments)
    given["learning_rate"] = max(recipe.learning_rates().values())
    given["remove_unused_columns"] = False  # a row's columns become the model's arguments in the collator
    given.setdefault("prediction_loss_only", True)
    given.setdefault("report_to", "none")
    if recipe.data.eval_source is not None:
        given.setdefault("eval_strategy", "steps")
        given.setdefault("eval_steps", given.get("save_steps", 500))
        given.setdefault("per_device_eval_batch_size", given.get("per_device_train_batch_size", 8))
    if not torch.accelerator.is_available():
        given.setdefault("use_cpu", True)
    if given.get("use_cpu"):
        given.setdefault("dataloader_pin_memory", False)
    if recipe.data.streaming:
        # One process cannot distribute batches of different lengths, so each process reads the stream.
        given.setdefault("accelerator_config", {"dispatch_batches": False})
    precision = _precision(recipe, bool(given.get("use_cpu")))
    given |= {"bf16": precision == "bfloat16", "fp16": precision == "float16"}
    given |= _checkpointing(recipe)
    per_device = given.setdefault("per_device_train_batch_size", 8)
    if recipe.train.global_batch_size is not None:
        devices = int(os.environ.get("WORLD_SIZE", "1"))
        given["gradient_accumulation_steps"] = _accumulation(recipe.train.global_batch_size, per_device, devices)
    arguments = TrainingArguments(output_dir=os.path.expanduser(str(recipe.output_dir)), **given)
    if arguments.n_gpu > 1:
        # With several devices in one process Trainer uses DataParallel, which splits a batch apart from its images.
        arguments._n_gpu = 1
    return arguments


def autocast_dtype(arguments: TrainingArguments) -> torch.dtype | None:
    """Return the autocast dtype; None without autocast."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


def _checkpointing(recipe: Recipe) -> dict[str, Any]:
    if not recipe.train.gradient_checkpointing:
        return {}
    # Transformers 5.23 renamed the argument; the old name warns.
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _accumulation(total: int, per_device: int, devices: int) -> int:
    at_once = per_device * devices
    if total < 1 or total % at_once:
        fitting = [size for size in range(1, per_device) if total % (size * devices) == 0]
        hint = f"Set arguments.per_device_train_batch_size={fitting[-1]}" if fitting else "Choose another batch size"
        raise ValueError(
            f"train.global_batch_size is {total}, but {devices} device{'s' * (devices > 1)} of {per_device} rows each "
            f"(arguments.per_device_train_batch_size) take {at_once} rows per step, which does not divide it. {hint}."
        )
    return total // at_once


def _precision(recipe: Recipe, on_cpu: bool) -> str:
    """Return the compute precision, with "auto" resolved."""
    wanted: str = recipe.train.precision
    if wanted != "auto":
        return wanted
    if recipe.model.dtype != "float32":
        return "float32"  # no autocast: computations use the dtype of the weights
    if on_cpu:
        return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    has_it = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_it else "float32"
