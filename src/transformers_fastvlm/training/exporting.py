# SPDX-License-Identifier: Apache-2.0
"""Export of the finished model into a run's directory, in the form that the recipe sets."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from .. import FastVLMForConditionalGeneration
from ..storage.atomic_files import sync_directory, sync_tree
from .launching import whole_models
from .models import torch_dtype
from .recipe_loading import load_model, prepare_encoder
from .recipes import Recipe
from .trainer import STAGING, FastVLMTrainer, last_checkpoint

__all__ = ["FINISHED", "export", "is_finished"]

FINISHED = ("config.json", "adapter_config.json")
"""The file among these that a result has is written last: no loader accepts a directory without it."""


def is_finished(out: Path) -> bool:
    """Return whether a run's directory has its finished model."""
    return any((out / name).is_file() for name in FINISHED)


def export(trainer: FastVLMTrainer, recipe: Recipe, out: Path, checkpoint: Path | None = None) -> None:
    """Write model and processor into the run's directory.

    They are written to a staging directory first, so that a full disk leaves nothing that looks finished. All
    processes call this, since a model may be sharded; the main process writes.

    Args:
        trainer: the trainer, after training.
        recipe: its export section sets what is merged and the dtype of the weights.
        out: the directory of the run.
        checkpoint: directory of the trained weights, if this process did not train them.
    """
    partial = out / STAGING
    if trainer.args.should_save:
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        if checkpoint is None:
            if trainer.is_fsdp_enabled:  # saved unsharded
                trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
            trainer.save_model(str(partial / "trained"))
            trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            with whole_models(trainer):
                _publish(trainer, recipe, partial / "trained" if checkpoint is None else checkpoint, out)
    except Exception as error:
        kept = last_checkpoint(out)
        raise OSError(
            f"The finished model could not be written to {out} ({type(error).__name__}: {error}). "
            + (f"{kept.name} is complete: free disk space and resume." if kept else "There is no checkpoint to resume.")
        ) from error
    finally:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)


def _publish(trainer: FastVLMTrainer, recipe: Recipe, trained: Path, out: Path) -> None:
    final = out / STAGING / "final"
    _finished(recipe, trained).save_pretrained(final)
    trainer.processing_class.save_pretrained(final)
    sync_tree(final)
    for name in FINISHED:
        (out / name).unlink(missing_ok=True)
    for file in sorted(final.iterdir(), key=lambda file: file.name in FINISHED):
        file.replace(out / file.name)
    sync_directory(out)


def _finished(recipe: Recipe, directory: Path) -> Any:
    """Load the trained weights on the CPU and bring the model into its final form."""
    dtype = torch_dtype(recipe.export.dtype or recipe.model.dtype)
    if recipe.lora is not None:
        from .lora import attach, merge

        # Adapters are merged into the full weights, even if they were trained on four bits.
        base = dataclasses.replace(recipe, lora=None)
        model, _ = load_model(base)
        prepare_encoder(model, base)
        model = attach(model, directory)
        if not recipe.export.merge_lora:
            return model
        model = merge(model)
    else:
        model = FastVLMForConditionalGeneration.from_pretrained(directory, dtype=torch_dtype(recipe.model.dtype))
    if recipe.export.merge_encoder:
        # Merge before rounding: a merge of rounded branches has a larger error than a rounded merge.
        model.model.vision_tower.float().eval().reparameterize()
    vars(model.config).pop("use_cache", None)  # Trainer sets it for training
    return model.to(dtype)
