# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers, given the path of a checkpoint, find the model's class by its name in `transformers`."""

import math
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


def arguments(configuration: Any, out: Path, **options: Any) -> Any:
    return configuration(
        output_dir=str(out),
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        **{CHECKPOINTING: False},
        **options,
    )


def rows(image: Any, **columns: Any) -> Any:
    """Return four rows about one image; a column is one value, or a list of four."""
    prompt = [{"role": "user", "content": "What is this?"}]
    values = {name: value if isinstance(value, list) else [value] * 4 for name, value in columns.items()}
    return Dataset.from_list(
        [
            {"images": [image], "prompt": prompt, **{name: column[number] for name, column in values.items()}}
            for number in range(4)
        ]
    )


def said(*words: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": word}] for word in words]


def trained(trainer: Any) -> list[dict[str, float]]:
    """Train; return what was logged at the two steps. The model is one of ours, and all of it has moved."""
    assert type(trainer.model) is FastVLMForConditionalGeneration
    assert type(trainer.processing_class) is transformers_fastvlm.FastVLMProcessor
    names = ("lm_head.weight", "model.multi_modal_projector.linear_1.weight")
    before = [trainer.model.get_parameter(name).detach().clone() for name in names]
    trainer.train()
    assert not any(old.equal(trainer.model.get_parameter(name)) for old, name in zip(before, names, strict=True))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    return logged


def test_sft_from_a_path(checkpoint: Callable[[str], Path], image: Any, tmp_path: Path) -> None:
    data = rows(image, completion=said("A sign.", "A sign.", "A sign.", "A sign."))
    trainer = trl.SFTTrainer(
        str(checkpoint("qwen2_tied")), args=arguments(trl.SFTConfig, tmp_path, max_length=None), train_dataset=data
    )
    first, second = trained(trainer)
    assert second["loss"] < first["loss"]


def test_dpo_from_a_path(checkpoint: Callable[[str], Path], image: Any, tmp_path: Path) -> None:
    """The reference model is found by the path too: at first both agree, and then the chosen answer gains."""
    data = rows(image, chosen=said(*["A sign."] * 4), rejected=said(*["A street."] * 4))
    trainer = trl.DPOTrainer(
        str(checkpoint("qwen2_tied")), args=arguments(trl.DPOConfig, tmp_path, max_length=None), train_dataset=data
    )
    first, second = trained(trainer)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-4) and second["loss"] < first["loss"]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4) and second["rewards/margins"] > 0


def test_grpo_from_a_path(checkpoint: Callable[[str], Path], image: Any, tmp_path: Path) -> None:
    """With `beta` there is a reference model, from which the trained one begins to differ."""
    seen: list[list[dict[str, str]]] = []

    def later_is_better(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(number) for number in range(len(completions))]

    options = {"beta": 0.1, "num_generations": 2, "max_completion_length": 4}
    trainer = trl.GRPOTrainer(
        str(checkpoint("qwen2_tied")),
        reward_funcs=later_is_better,
        args=arguments(trl.GRPOConfig, tmp_path, **options),
        train_dataset=rows(image),
    )
    first, second = trained(trainer)
    assert [message["role"] for messages in seen for message in messages] == ["assistant"] * 4
    assert first["reward"] == 0.5
    assert first["kl"] == pytest.approx(0, abs=1e-4) and second["kl"] > 1e-3
