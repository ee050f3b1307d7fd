# SPDX-License-Identifier: Apache-2.0
"""The sampler under accelerate and `Trainer`: the same number of steps on every process, and resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from transformers_fastvlm import FastVLMForConditionalGeneration, FastVLMProcessor, data
from transformers_fastvlm.data import FastVLMDataCollator, ModalityLengthSampler
from transformers_fastvlm.data.batching import grouped_sampler

pytest.importorskip("accelerate", reason="needs the package accelerate")

from accelerate.data_loader import get_sampler, prepare_data_loader, skip_first_batches
from transformers import Trainer, TrainingArguments

LENGTHS, HAS_IMAGE = np.random.default_rng(0).integers(5, 500, 53), np.arange(53) % 3 > 0


def loader_of(process: int) -> Any:
    sampler = ModalityLengthSampler(LENGTHS, HAS_IMAGE, batch_size=4, num_processes=2, seed=1)
    loader = prepare_data_loader(
        DataLoader(range(53), 4, sampler=sampler, collate_fn=list),
        num_processes=2,
        process_index=process,
        put_on_device=False,
    )
    loader.set_sampler(sampler)
    assert get_sampler(loader) is sampler
    return loader


def test_processes_in_step() -> None:
    epochs = []
    for epoch in (0, 1):
        batches = []
        for process in (0, 1):
            loader = loader_of(process)
            loader.set_epoch(epoch)
            batches.append(list(loader))
            assert len(loader) == len(batches[-1]) == 8  # 35 and 18 rows are 5 and 3 steps of 8
        for one, other in zip(*batches, strict=True):
            assert len(one) == len(other) == 4
            assert len({bool(HAS_IMAGE[row]) for row in one + other}) == 1
        assert {row for process in batches for batch in process for row in batch} == set(range(53))
        epochs.append(batches)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("process", [0, 1])
def test_resuming_within_a_later_epoch(process: int) -> None:
    whole = loader_of(process)
    whole.set_epoch(1)
    resumed = skip_first_batches(loader_of(process), 3)
    resumed.set_epoch(1)
    assert list(resumed) == list(whole)[3:]


class GroupingTrainer(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        self.sampler = grouped_sampler(train_dataset or self.train_dataset, self.args)
        return self.sampler

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        loader.set_sampler(self.sampler)
        return loader


def chat(question: str, answer: str, number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    images = [{"path": "tiny_rgb.png"}] * question.count("<image>")
    return {"messages": turns, "images": images, "id": str(number)}


def test_trainer(checkpoint: Callable[[str], Path], golden: Path, tmp_path: Path) -> None:
    """Batches of pixels and of text alone in one run, and nothing that Trainer needs is missing."""
    path = checkpoint("qwen2_tied")
    collate = FastVLMDataCollator(FastVLMProcessor.from_pretrained(path))
    rows = [chat("<image>\nWhat?" if n % 2 else "Hi?", "A " * (n + 1), n) for n in range(8)]
    seen: list[tuple[list[int], bool]] = []

    def collator(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(samples)
        seen.append(([int(sample["id"]) for sample in samples], "pixel_values" in batch))
        return batch

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_train_epochs=2,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = GroupingTrainer(
        model=FastVLMForConditionalGeneration.from_pretrained(path),
        args=arguments,
        train_dataset=data.load(rows, golden / "images"),
        data_collator=collator,
    )
    trainer.train()
    assert trainer.state.global_step == 8
    assert sorted(number for batch, _ in seen for number in batch) == sorted(list(range(8)) * 2)
    assert all({number % 2 for number in batch} == {int(pixels)} for batch, pixels in seen)
    assert seen[:4] != seen[4:]
