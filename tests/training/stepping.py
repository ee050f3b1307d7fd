# SPDX-License-Identifier: Apache-2.0
"""One optimizer step on a golden batch, under a trainer of any kind."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from test_modeling_fastvlm import check_gradients
from transformers_fastvlm.data import FastVLMDataCollator

__all__ = ["CHECKPOINTING", "Gradients", "train"]

# Named so from Transformers 5.23 on, where the old name warns.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(TrainingArguments)}
)
"""The argument that turns gradient checkpointing on."""


class Gradients(TrainerCallback):
    """Checks each parameter's gradient norm against the reference's before the optimizer steps."""

    def __init__(self, expected: dict[str, float | None]) -> None:
        self.expected, self.checked = expected, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_gradients(model, self.expected)
        self.checked += 1


def train(
    kind: type[Trainer],
    loaded: tuple[Any, Any],
    rows: Any,
    conversation: str,
    out: Path,
    *,
    arguments: dict[str, Any] | None = None,
    configuration: type[TrainingArguments] = TrainingArguments,
    **options: Any,
) -> Trainer:
    """Train a model one step, on all rows at once unless `arguments` say otherwise, and return the trainer."""
    model, processor = loaded
    given = {
        "output_dir": str(out),
        "per_device_train_batch_size": len(rows),
        "max_steps": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    trainer = kind(
        model=model,
        args=configuration(**{**given, **(arguments or {})}),
        train_dataset=rows,
        data_collator=FastVLMDataCollator(processor, conversation=conversation),
        processing_class=processor,
        **options,
    )
    trainer.train()
    return trainer
