# SPDX-License-Identifier: Apache-2.0
"""What `TrainingArguments` become of a recipe: batches, precision, checkpointing, and what FastVLM always needs."""

from collections.abc import Callable

import pytest
import torch

from transformers_fastvlm.training import Recipe
from transformers_fastvlm.training.arguments import _accumulation as accumulation
from transformers_fastvlm.training.arguments import autocast_dtype, training_arguments

pytest.importorskip("accelerate", reason="TrainingArguments need accelerate")

MakeRecipe = Callable[..., Recipe]


def test_rows_reach_the_collator_whole_and_nothing_is_reported_unasked(recipe: MakeRecipe) -> None:
    arguments = training_arguments(recipe())
    assert arguments.remove_unused_columns is False
    assert arguments.report_to == [] and arguments.prediction_loss_only
    assert arguments.n_gpu <= 1
    assert str(arguments.eval_strategy.value) == "no"


def test_the_rest_is_handed_on_unchanged(recipe: MakeRecipe) -> None:
    arguments = training_arguments(recipe(arguments={"weight_decay": 0.3, "adam_beta2": 0.95, "warmup_steps": 0.5}))
    assert (arguments.weight_decay, arguments.adam_beta2, arguments.per_device_train_batch_size) == (0.3, 0.95, 2)
    assert arguments.get_warmup_steps(10) == 5


def test_the_largest_rate_is_the_one_that_is_logged(recipe: MakeRecipe) -> None:
    rates = {"vision_tower": 2e-6, "projector": 1e-3, "language_model": 2e-5}
    assert training_arguments(recipe(train={"learning_rate": rates})).learning_rate == 1e-3


@pytest.mark.parametrize(("total", "devices", "accumulated"), [(8, 1, 4), (8, 2, 2), (8, 4, 1), (2, 1, 1)])
def test_the_global_batch_is_kept_on_any_number_of_devices(total: int, devices: int, accumulated: int) -> None:
    assert accumulation(total, 2, devices) == accumulated


def test_a_global_batch_that_does_not_divide_is_refused_with_one_that_does(recipe: MakeRecipe) -> None:
    assert training_arguments(recipe(train={"global_batch_size": 6})).gradient_accumulation_steps == 3
    with pytest.raises(ValueError, match=r"is 12, but 2 devices of 8 rows each .* take 16 rows per.*batch_size=6\."):
        accumulation(12, 8, 2)
    with pytest.raises(ValueError, match=r"is 3, but 4 devices .* Choose another batch size\."):
        accumulation(3, 8, 4)
    with pytest.raises(ValueError, match="is 0, but"):
        training_arguments(recipe(train={"global_batch_size": 0}))


def test_evaluation_comes_with_its_data(recipe: MakeRecipe) -> None:
    arguments = training_arguments(recipe(data={"eval_source": "rows.json"}))
    assert arguments.eval_strategy.value == "steps" and arguments.eval_steps == arguments.save_steps == 2
    assert arguments.per_device_eval_batch_size == 2
    own = {"eval_strategy": "epoch", "per_device_eval_batch_size": 7}
    arguments = training_arguments(recipe(data={"eval_source": "rows.json"}, arguments=own))
    assert arguments.eval_strategy.value == "epoch" and arguments.per_device_eval_batch_size == 7


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ("float32", "float32", None),
        ("bfloat16", "float32", torch.bfloat16),
        ("auto", "bfloat16", None),  # the weights' own type, without autocast
        ("auto", "float32", torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None),
    ],
)
def test_precision(precision: str, dtype: str, expected: torch.dtype | None, recipe: MakeRecipe) -> None:
    arguments = training_arguments(recipe(train={"precision": precision}, model={"dtype": dtype}))
    assert autocast_dtype(arguments) == expected and not arguments.fp16


def test_checkpointing_is_never_reentrant(recipe: MakeRecipe) -> None:
    """The old kind wants inputs that need a gradient, which a frozen encoder does not give. Its name changed."""
    arguments = training_arguments(recipe(train={"gradient_checkpointing": True}))
    assert vars(arguments).get("activation_checkpointing", arguments.gradient_checkpointing) is True
    options = vars(arguments).get("activation_checkpointing_kwargs") or arguments.gradient_checkpointing_kwargs
    assert options == {"use_reentrant": False}


def test_every_process_reads_a_stream_for_itself(recipe: MakeRecipe) -> None:
    arguments = training_arguments(recipe(data={"streaming": True}))
    assert arguments.accelerator_config.dispatch_batches is False
