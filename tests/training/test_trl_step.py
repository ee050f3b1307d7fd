# SPDX-License-Identifier: Apache-2.0
"""TRL's `SFTTrainer` on the golden batch: the reference's loss and gradients, and the update of plain `Trainer`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import relative_error
from transformers_fastvlm.data import load

pytest.importorskip("trl", reason="needs TRL")
import trl
from stepping import CHECKPOINTING, Gradients, train
from transformers import Trainer

# Of TRL, where there is no GPU.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

OWN = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False}


@pytest.mark.parametrize("conversation", ["sft", "plain"])
def test_a_step_is_plain_trainers_and_the_references(
    conversation: str,
    load_tiny: Callable[[], tuple[Any, Any]],
    golden: Path,
    golden_batches: dict[str, Any],
    tmp_path: Path,
) -> None:
    pytest.importorskip("datasets", reason="needs datasets")
    case = golden_batches[conversation]
    rows = load(case["samples"], image_folder=golden / "images")
    # Adam's first step shows no more than the signs of gradients, and a small one drowns in the weights' rounding.
    descent = {"optim": "sgd", "learning_rate": 1e3}
    plain = train(Trainer, load_tiny(), rows, conversation, tmp_path, arguments=descent)
    check = Gradients(case["grad_norm"])
    trainer = train(
        trl.SFTTrainer,
        load_tiny(),
        rows.to_datasets(),
        conversation,
        tmp_path,
        arguments={**OWN, **descent, CHECKPOINTING: False},
        configuration=trl.SFTConfig,
        callbacks=[check],
    )
    assert check.checked == 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(case["loss"], rel=1e-4)
    before, theirs, ours = (model.state_dict() for model in (load_tiny()[0], plain.model, trainer.model))
    moved = [name for name in before if not torch.equal(before[name], theirs[name])]
    assert len(moved) > 100
    for name in before:
        if name not in moved:
            assert torch.equal(before[name], ours[name]), name
        else:
            assert relative_error(ours[name] - before[name], theirs[name] - before[name]) < 1e-4, name
