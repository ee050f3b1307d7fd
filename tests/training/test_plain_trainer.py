# SPDX-License-Identifier: Apache-2.0
"""What plain `Trainer` and TRL's `SFTTrainer` do with the model as it is: resume, take the best, evaluate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transformers_fastvlm.data import FastVLMDataCollator, load
from transformers_fastvlm.training import FastVLMTrainer

pytest.importorskip("accelerate", reason="Trainer needs accelerate")
from stepping import CHECKPOINTING
from transformers import Trainer, TrainingArguments

# Of TRL, where there is no GPU.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

Loaded = Callable[[], tuple[Any, Any]]
KINDS = ["Trainer", "SFTTrainer"]


@pytest.fixture
def rows(golden: Path, golden_batches: dict[str, Any]) -> Any:
    return load(golden_batches["sft"]["samples"], image_folder=golden / "images")


def trainer_of(kind: str, loaded: tuple[Any, Any], rows: Any, out: Path, **options: Any) -> Any:
    """Return a trainer of the whole golden model, with a checkpoint at each of two steps."""
    arguments = {
        "output_dir": str(out),
        "max_steps": 2,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 1,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": [],
        **options.pop("arguments", {}),
    }
    configuration: Any = TrainingArguments
    trainer: Any = FastVLMTrainer if kind == "FastVLMTrainer" else Trainer
    if kind == "SFTTrainer":
        trl = pytest.importorskip("trl", reason="needs TRL")
        pytest.importorskip("datasets", reason="needs datasets")
        configuration, trainer, rows = trl.SFTConfig, trl.SFTTrainer, rows.to_datasets()
        arguments |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False}
        arguments[CHECKPOINTING] = False
    model, processor = loaded
    return trainer(
        model=model,
        args=configuration(**arguments),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
        **{"data_collator": FastVLMDataCollator(processor), **options},
    )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def different(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    kind: str, load_tiny: Loaded, rows: Any, tmp_path: Path
) -> None:
    whole = trainer_of(kind, load_tiny(), rows, tmp_path)
    whole.train()
    resumed = trainer_of(kind, load_tiny(), rows, tmp_path)
    before = weights(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(different(before, weights(resumed))) > 100
    assert different(weights(whole), weights(resumed)) == []


def test_the_best_model_is_loaded_at_the_end(load_tiny: Loaded, rows: Any, tmp_path: Path) -> None:
    metrics = iter([{"eval_good": 1.0}, {"eval_good": 0.0}])

    class Judged(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            found = next(metrics)
            self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
            return found

    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "good",
        "greater_is_better": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.Trainer", Judged)
        best = trainer_of("Trainer", load_tiny(), rows, tmp_path, arguments=arguments)
        best.train()
    assert best.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    model = type(best.model).from_pretrained(tmp_path / "checkpoint-1")
    assert different(weights(best), dict(model.state_dict())) == []
    last = type(best.model).from_pretrained(tmp_path / "checkpoint-2")
    assert len(different(weights(best), dict(last.state_dict()))) > 100


def test_evaluation_with_metrics_gives_logits_and_nothing_else(load_tiny: Loaded, rows: Any, tmp_path: Path) -> None:
    """A batch of text alone beside one with an image, whose outputs differ in all but the logits."""
    text = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}], "images": []}
    samples = [text, rows[0], text]
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"rows": float(len(prediction.predictions))}

    trainer = trainer_of("Trainer", load_tiny(), samples, tmp_path, compute_metrics=metrics)
    assert trainer.evaluate()["eval_rows"] == 3
    predictions, labels = seen[0].predictions, seen[0].label_ids
    assert isinstance(predictions, np.ndarray) and predictions.ndim == 3
    assert predictions.shape[:2] == labels.shape
    assert predictions.shape[2] == trainer.model.config.text_config.vocab_size


def test_placeholders_are_never_learned(load_tiny: Loaded, rows: Any) -> None:
    """TRL's collators copy the ids to the labels, placeholders included."""
    model, processor = load_tiny()
    batch = FastVLMDataCollator(processor)([rows[0]])
    copied = batch["input_ids"].clone()
    assert (copied == processor.image_token_id).sum() > 4
    meant = copied.masked_fill(copied == processor.image_token_id, -100)
    with torch.no_grad():
        losses = [model(**{**batch, "labels": labels}).loss for labels in (copied, meant, batch["labels"])]
    assert losses[0] == losses[1] != losses[2]
    assert (copied == processor.image_token_id).any(), "the caller's labels are left as they are"


def test_placeholders_in_labels_do_not_count_as_learned(load_tiny: Loaded, rows: Any, tmp_path: Path) -> None:
    """The loss is divided by the labels that `Trainer` counts before the model sees them."""
    own = FastVLMDataCollator(load_tiny()[1])
    placeholder = own.processor.image_token_id

    def of_others(samples: list[Any]) -> dict[str, torch.Tensor]:
        batch = own(samples)
        return {**batch, "labels": torch.where(batch["input_ids"] == placeholder, placeholder, batch["labels"])}

    losses = []
    for collator in (own, of_others):
        arguments = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_steps": 1}
        arguments |= {"logging_steps": 1, "save_strategy": "no"}
        options = {"kind": "FastVLMTrainer", "arguments": arguments, "data_collator": collator}
        trainer = trainer_of(loaded=load_tiny(), rows=rows, out=tmp_path, **options)
        trainer.train()
        losses.append((trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]))
    assert losses[0] == losses[1]


def test_a_sampler_may_be_asked_for_again(load_tiny: Loaded, rows: Any, tmp_path: Path) -> None:
    trainer = trainer_of("FastVLMTrainer", load_tiny(), rows, tmp_path, group=True)
    before = list(trainer.callback_handler.callbacks)
    samplers = [trainer.get_train_dataloader().sampler for _ in range(3)]
    assert trainer.callback_handler.callbacks == before
    trainer.state.epoch = 4.0
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert trainer._get_train_sampler().epoch == 0 and samplers[-1] is not samplers[0]
