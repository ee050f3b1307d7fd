# SPDX-License-Identifier: Apache-2.0
"""`Trainer` with a learning rate for each part, and checkpoints that are written atomically.

Transformers' `Trainer` trains FastVLM as well. With this package's collator both compute the same steps.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..data import FastVLMDataCollator, grouped_sampler
from ..data.collator import IGNORED
from ..storage.atomic_files import publish_directory
from .parts import decays, parameter_groups

__all__ = ["STAGING", "FastVLMTrainer", "last_checkpoint", "leave_frozen_inputs", "rotate_checkpoints"]

STAGING = ".incomplete"
_STATE_FILE = "trainer_state.json"


class FastVLMTrainer(Trainer):
    """`Trainer` for FastVLM.

    - Each part has its learning rate, and weight decay skips biases, norms and layer scales.
    - With `group=True` batches hold rows of similar length and kind.
    - A checkpoint is written under a hidden name, synced to disk and then renamed: an interrupted save leaves the
      earlier checkpoints untouched and nothing that looks finished.
    - With gradient checkpointing a frozen encoder has no backward pass, as without checkpointing.
    - Image placeholders in the labels, which TRL's collators leave there, do not count as supervised tokens.

    Args:
        learning_rates: learning rate of each trained part, by name (`parts.PARTS`); None for the rate in the arguments.
        group: whether batches hold rows of similar length and kind.
        *args, **kwargs: as for `Trainer`.
    """

    data_collator: Any

    def __init__(
        self, *args: Any, learning_rates: Mapping[str, float] | None = None, group: bool = False, **kwargs: Any
    ) -> None:
        self.learning_rates = None if learning_rates is None else dict(learning_rates)
        self.group = group
        super().__init__(*args, **kwargs)
        self.add_callback(_LeaveFrozenInputs())
        self._epochs = _TellEpoch()
        self.add_callback(self._epochs)
        if not isinstance(self.data_collator, FastVLMDataCollator):
            placeholder: int = self.model.config.image_token_id
            self.data_collator = _WithoutPlaceholders(self.data_collator, placeholder)

    # Optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters that weight decay applies to; see `parts.decays`."""
        return [name for name, _ in model.named_parameters() if decays(name)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer of the arguments, with a parameter group for each part, with and without decay."""
        made_here = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made_here and self.learning_rates is not None:
            wanted = parameter_groups(self.model if model is None else model, self.learning_rates)
            optimizer.param_groups[:] = _split(optimizer.param_groups, wanted)
        return optimizer

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if getattr(self, "_staging", False) else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint into the staging directory, then rename it."""
        folder = Path(self._get_output_dir(trial))
        staging, name = folder / STAGING, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # leftovers of an interrupted run
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            self._record_best(folder, staging / name)
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)
            kept = last_checkpoint(folder)
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written to {folder} "
                f"({type(error).__name__}: {error}). "
                + (f"{kept.name} is complete: " if kept else "There is no earlier checkpoint: ")
                + "free disk space and resume."
            ) from error
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            # A checkpoint of this step exists if the run was resumed from an earlier one.
            publish_directory(staging / name, folder / name, aside=staging / f"replaced-{name}")
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(
                folder, self.state.global_step, self.args.save_total_limit, self.state.best_model_checkpoint
            )

    def _record_best(self, folder: Path, written: Path) -> None:
        """Correct the path of the best checkpoint, which `Trainer` sets inside the staging directory."""
        if not self.state.best_global_step:
            return
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir() or best.name == written.name:
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(written / _STATE_FILE))

    # Data

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.group or dataset is None:
            return super()._get_train_sampler(train_dataset)
        processor: Any = self.processing_class
        tokens = processor._get_num_multimodal_tokens([(480, 640)]).num_image_tokens[0]
        self._epochs.sampler = grouped_sampler(getattr(dataset, "captions", dataset), self.args, tokens)
        return self._epochs.sampler


class _TellEpoch(TrainerCallback):
    """Sets the epoch of a sampler; accelerate does not after resuming with several processes."""

    sampler: Any = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


class _WithoutPlaceholders:
    """Wraps another collator and masks image placeholders in its labels, which the model ignores.

    `Trainer` counts the labels before the model sees them, and divides the loss by their number.
    """

    def __init__(self, collator: Any, placeholder: int) -> None:
        self.collator, self.placeholder = collator, placeholder

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(samples)
        if "labels" in batch:
            batch["labels"] = batch["labels"].masked_fill(batch["labels"] == self.placeholder, IGNORED)
        return batch


class _LeaveFrozenInputs(TrainerCallback):
    """Undoes the gradient requirement of the inputs of checkpointed blocks.

    Transformers sets it for PyTorch's reentrant checkpointing, which would not train otherwise. For non-reentrant
    checkpointing it only causes a useless backward pass through a frozen encoder.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        options = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
        if not options.get("use_reentrant"):
            leave_frozen_inputs(model)


def leave_frozen_inputs(model: nn.Module) -> None:
    """Undo `enable_input_require_grads` wherever it was called in a model."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.disable_input_require_grads()


def last_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Return the newest complete checkpoint in a run's directory, or None if there is none.

    `FastVLMTrainer` leaves no incomplete checkpoints; a plain `Trainer` that is killed while saving does.
    """
    found = _checkpoints(Path(directory))
    return max(found)[1] if found else None


def rotate_checkpoints(folder: Path, step: int, limit: int | None, best: str | None) -> None:
    """Delete the oldest surplus checkpoints by step, but never that of `step`, the best, a later one, or a link.

    Transformers orders checkpoints by modification time, which is wrong after the clock is set back.

    Args:
        folder: directory of the run.
        step: step of the checkpoint just written.
        limit: maximum number of checkpoints up to `step` to keep; None or 0 for all.
        best: path of the best checkpoint.
    """
    if not limit:
        return
    kept = {f"checkpoint-{step}", Path(best or "").name}
    there = [(number, path) for number, path in _checkpoints(folder) if number <= step and not path.is_symlink()]
    others = sorted((number, path) for number, path in there if path.name not in kept)
    for _, path in others[: max(0, len(there) - limit)]:
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return the steps and folders of the complete checkpoints."""
    found = []
    for path in directory.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and _is_whole(path):
            found.append((int(match.group(1)), path))
    return found


def _is_whole(checkpoint: Path) -> bool:
    """Return whether the file that `Trainer` writes last exists and is complete."""
    try:
        return "global_step" in json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _split(groups: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split an optimizer's groups by part; other options are unchanged."""
    part_and_rate = {id(p): (group["part"], group["lr"]) for group in wanted for p in group["params"]}
    split: dict[tuple[int, str], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            part, rate = part_and_rate[id(parameter)]
            new = split.setdefault((index, part), {**group, "params": [], "lr": rate})
            new["params"].append(parameter)
    return list(split.values())
