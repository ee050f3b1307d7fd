# SPDX-License-Identifier: Apache-2.0
"""The memory that is told before a run against the memory that a step takes, counted tensor by tensor."""

import contextlib
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from transformers_fastvlm.data import FastVLMDataCollator, load
from transformers_fastvlm.training import PARTS, new_model, set_trainable
from transformers_fastvlm.training.memory import MemoryEstimate, estimate_memory, readable_size
from transformers_fastvlm.training.trainer import leave_frozen_inputs

VISION = {
    "depths": [1] * 5,
    "hidden_sizes": [8, 16, 32, 64, 128],
    "projection_dim": 0,
    "image_size": 128,
    "reparameterized": False,
}
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, and the most at any time since it was entered."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_iter(output):
            if isinstance(value, Tensor):
                self._add(value)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def take_step(model: Any, batch: dict[str, Tensor], optimizer: Any, autocast: torch.dtype | None) -> None:
    with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def checkpoint_activations(model: Any) -> None:
    # Named so from Transformers 5.23 on, where the old name warns.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    leave_frozen_inputs(model)


@pytest.mark.parametrize(
    ("encoder", "parts", "autocast", "checkpointing"),
    [
        ("merged", PARTS, None, False),
        ("train-time", PARTS, None, False),
        ("train-time", PARTS, None, True),
        pytest.param("train-time", PARTS, torch.bfloat16, False, marks=pytest.mark.soak),
        ("train-time", ["projector"], None, False),
        ("train-time", ["projector"], None, True),
    ],
)
def test_the_estimate_is_what_a_step_takes(
    encoder: str,
    parts: list[str],
    autocast: torch.dtype | None,
    checkpointing: bool,
    load_tiny: Callable[[], Any],
    checkpoint: Callable[[str], Path],
    golden: Path,
    golden_batches: dict[str, Any],
) -> None:
    model, processor = load_tiny() if encoder == "merged" else new_model(VISION, TEXT, checkpoint("qwen2_tied"))
    set_trainable(model, parts)
    model.train()
    rows = load(golden_batches["sft"]["samples"], image_folder=golden / "images")
    batch = FastVLMDataCollator(processor)([rows[0], rows[1], rows[2]])
    before = {name: (value.clone(), value.requires_grad) for name, value in model.state_dict(keep_vars=True).items()}
    estimate = estimate_memory(model, batch, autocast=autocast, gradient_checkpointing=checkpointing)
    after = model.state_dict(keep_vars=True)
    assert all(value.equal(after[name]) and flag == after[name].requires_grad for name, (value, flag) in before.items())

    if checkpointing:
        checkpoint_activations(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    take_step(model, batch, optimizer, autocast)  # makes the optimizer's states
    states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.numel() > 1]
    assert estimate.optimizer == sum(tensor.nbytes for tensor in states)
    assert estimate.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    live = LiveBytes([*model.parameters(), *model.buffers(), *states])
    assert estimate.weights == pytest.approx(live.now - estimate.optimizer, rel=0.01)
    with live:
        take_step(model, batch, optimizer, autocast)
    assert estimate.peak == pytest.approx(live.peak, rel=0.06)


def test_checkpointing_and_freezing_take_less(
    load_tiny: Callable[[], Any], golden: Path, golden_batches: dict[str, Any]
) -> None:
    model, processor = load_tiny()
    rows = load(golden_batches["sft"]["samples"], image_folder=golden / "images")
    batch = FastVLMDataCollator(processor)([rows[0], rows[1]])
    whole = estimate_memory(model, batch)
    assert estimate_memory(model, batch, gradient_checkpointing=True).peak < 0.8 * whole.peak
    assert estimate_memory(model, batch, accumulates=True).peak == whole.peak + whole.gradients
    assert estimate_memory(model, batch, optimizer="adamw_8bit").optimizer == whole.optimizer // 4
    set_trainable(model, ["projector"])
    frozen = estimate_memory(model, batch)
    assert frozen.peak < 0.5 * whole.peak
    assert estimate_memory(model, batch, gradient_checkpointing=True).peak < frozen.peak


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_process_forked_after_an_estimate_can_train() -> None:
    """As accelerate's notebook_launcher does it; in a process whose first backward pass is that of the estimate."""
    code = """
        import os, torch
        from transformers import AutoModelForImageTextToText
        from transformers_fastvlm.checkpoints import tiny_checkpoint
        from transformers_fastvlm.training.memory import estimate_memory

        model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint())
        ids = torch.zeros(1, 8, dtype=torch.long)
        estimate_memory(model, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
        child = os.fork()
        if not child:
            model(input_ids=ids, labels=ids).loss.backward()
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.stdout.strip() == "7", done.stderr[-2000:]


def test_sizes_are_readable() -> None:
    assert readable_size(3 * 2**29) == "1.50 GiB" and readable_size(5 * 2**20) == "5 MiB"
    text = str(MemoryEstimate(2**30, 2**29, 2**31, 2**28, 2**20, 2**32))
    assert text.startswith("about 4.00 GiB per device at the peak (weights 1.00 GiB, gradients 512 MiB, optimizer 2.00")
