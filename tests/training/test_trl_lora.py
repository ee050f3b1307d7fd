# SPDX-License-Identifier: Apache-2.0
"""TRL's `SFTTrainer` with `peft_config`: it adapts the same layers, and what it saves loads and merges."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import relative_error
from transformers_fastvlm.data import load
from transformers_fastvlm.training import load_merged, lora_config

pytest.importorskip("peft", reason="adapters need peft")
pytest.importorskip("datasets", reason="needs datasets")
pytest.importorskip("trl", reason="needs TRL")
import trl
from stepping import CHECKPOINTING, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # Of TRL, where there is no GPU.
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

IDS = torch.arange(3, 40)[None]


def test_peft_config(
    load_tiny: Callable[[], tuple[Any, Any]], golden: Path, golden_batches: dict[str, Any], tmp_path: Path
) -> None:
    case = golden_batches["sft"]
    model, processor = load_tiny()
    trainer = train(
        trl.SFTTrainer,
        (model, processor),
        load(case["samples"], image_folder=golden / "images").to_datasets(),
        "sft",
        tmp_path,
        arguments={
            "max_length": None,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "bf16": False,
            "max_steps": 2,
            "learning_rate": 1e-2,
            CHECKPOINTING: True,
        },
        configuration=trl.SFTConfig,
        peft_config=lora_config(model, r=4, dropout=0.0),
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(case["loss"], rel=1e-4)  # adapters begin as nothing
    assert losses[1] < losses[0]

    trainer.save_model(str(tmp_path / "adapter"))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 42 and all(".language_model.layers." in name for name in stored)
    trained = trainer.model.eval()
    with torch.no_grad():
        expected = trained(input_ids=IDS).logits
        merged = load_merged(tmp_path / "adapter", load_tiny()[0])
        assert relative_error(merged(input_ids=IDS).logits, expected) < 1e-4
