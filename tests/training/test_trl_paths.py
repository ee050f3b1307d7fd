# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers, given the path of a checkpoint, find the model's class by its name in `transformers`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs TRL")
pytest.importorskip("datasets", reason="needs datasets")
import trl
from datasets import Dataset
from stepping import CHECKPOINTING
from trl.trainer.utils import create_model_from_path

import transformers_fastvlm
from transformers_fastvlm import FastVLMForConditionalGeneration

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.mark.parametrize("name", ["qwen2_tied", "llama"])
def test_class_of_a_path(name: str, checkpoint: Callable[[str], Path]) -> None:
    """What DPO without `peft_config` and GRPO with `beta` do for their reference model as well."""
    assert type(create_model_from_path(str(checkpoint(name)))) is FastVLMForConditionalGeneration


def test_sft_from_a_path(checkpoint: Callable[[str], Path], picture: Any, tmp_path: Path) -> None:
    rows = [
        {
            "images": [picture],
            "prompt": [{"role": "user", "content": "What is this?"}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for answer in ("A sign.", "A street.", "A photo.", "A wall.")
    ]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        max_steps=2,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        **{CHECKPOINTING: False},
    )
    trainer = trl.SFTTrainer(str(checkpoint("qwen2_tied")), args=arguments, train_dataset=Dataset.from_list(rows))
    assert type(trainer.model) is FastVLMForConditionalGeneration
    assert type(trainer.processing_class) is transformers_fastvlm.FastVLMProcessor
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert not before.equal(trainer.model.lm_head.weight)
