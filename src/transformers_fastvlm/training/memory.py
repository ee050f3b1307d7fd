# SPDX-License-Identifier: Apache-2.0
"""Estimate of the memory of a training step, before training.

Forward and backward pass run on fake tensors without data, and the bytes of live tensors are counted. So the estimate
accounts for frozen parts, merged encoders, adapters, gradient checkpointing and autocast.
"""

import contextlib
import copy
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .trainer import leave_frozen_inputs

__all__ = ["MemoryEstimate", "estimate_memory", "readable_size"]

# Bytes of optimizer state per trainable parameter. The default is AdamW: two states in the dtype of the parameter.
_STATE_BYTES: dict[str, float] = {
    "adafactor": 0.1,
    "sgd": 0.0,
    "adamw_8bit": 2.0,
    "adamw_bnb_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "lion_32bit": 4.0,
    "lion_8bit": 1.0,
    "paged_lion_8bit": 1.0,
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, without sharding.

    Attributes:
        weights: parameters and buffers.
        gradients: gradients of the trainable parameters.
        optimizer: states of the optimizer.
        activations: activations that the forward pass keeps for the backward pass, for one batch of a device.
        working: further memory at the peak: gradients so far, the gradient of the logits, or with gradient
            checkpointing the activations of the largest block.
        peak: the most at any time. It is below the sum of the above: gradients appear while activations are freed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    peak: int

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "activations")
        parts = ", ".join(f"{name} {readable_size(getattr(self, name))}" for name in names)
        peak, working = readable_size(self.peak), readable_size(self.working)
        return f"about {peak} per device at the peak ({parts}, working memory {working})"


def estimate_memory(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    optimizer: str = "adamw_torch",
    autocast: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    accumulates: bool = False,
) -> MemoryEstimate:
    """Return an estimate of the memory of a training step of a FastVLM.

    It does not include the framework's memory (0.5 GiB and more on a CUDA device), the allocator's fragmentation, the
    gradient copies of data parallel training, and data loading. Sharding divides weights, gradients and optimizer
    states by the number of devices.

    Args:
        model: a FastVLM, with or without adapters; not changed.
        batch: a batch of the collator; only shapes matter.
        optimizer: its name in `TrainingArguments.optim`.
        autocast: autocast dtype; None without autocast.
        gradient_checkpointing: whether activations are recomputed instead of kept.
        accumulates: whether an update accumulates several batches.

    Raises:
        RuntimeError: the model cannot run without data, for instance because its weights are quantized or sharded by
            ZeRO-3.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RuntimeError("ZeRO-3 has sharded its weights over the devices")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    state = _STATE_BYTES.get(optimizer)
    states = 2 * gradients if state is None else int(state * sum(parameter.numel() for parameter in trained))
    weights = sum(tensor.nbytes for group in (model.parameters(), model.buffers()) for tensor in group)
    # Autograd starts its threads at the first backward pass. FakeTensorMode pretends to have a CUDA device: a thread
    # would be started for it even without a GPU, and a process forked later could not train.
    torch.zeros((), requires_grad=True).backward()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _without_data(model, mode).train()
    with mode, _quiet():
        base: Any = getattr(twin, "get_base_model", lambda: twin)()
        if gradient_checkpointing:
            # Transformers 5.23 renamed the method.
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            leave_frozen_inputs(base)  # as FastVLMTrainer does
        fake = {name: mode.from_tensor(value) for name, value in batch.items() if isinstance(value, Tensor)}
        if accumulates:
            for parameter in twin.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with _LiveBytes(twin, fake.values()) as live:
            loss = _loss(base, fake, autocast)
            activations = live.now
            if loss.requires_grad:
                loss.backward()
    step = max(live.peak + (gradients if accumulates else 0), gradients)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=states,
        activations=activations,
        working=live.peak - activations,
        peak=weights + states + step,
    )


def _without_data(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of a model whose tensors have shapes, dtypes and devices, but no data."""
    held = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    tensors = {id(tensor): tensor for group in (model.parameters(), model.buffers(), held) for tensor in group}
    # deepcopy uses the memo's entry for an object instead of copying it.
    return copy.deepcopy(model, {key: mode.from_tensor(tensor) for key, tensor in tensors.items()})


def _loss(base: Any, batch: Mapping[str, Tensor], autocast: torch.dtype | None) -> Tensor:
    """Run the model part by part, to skip its checks of values, and return the loss."""
    ids, labels = batch["input_ids"], batch["labels"]
    with contextlib.nullcontext() if autocast is None else torch.autocast(ids.device.type, autocast):
        embeds = base.get_input_embeddings()(torch.zeros_like(ids))
        if "pixel_values" in batch:
            features = base.model.vision_tower(batch["pixel_values"]).last_hidden_state
            features = base.model.multi_modal_projector(features.flatten(2).transpose(1, 2))
            mask = (ids == base.config.image_token_id).unsqueeze(-1)
            embeds = embeds.masked_scatter(mask, features.to(embeds.dtype))
        decoded = base.model.language_model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], use_cache=False
        )
        logits = base.lm_head(decoded.last_hidden_state)
        loss: Tensor = base.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return loss


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors other than the model's, and their peak."""

    def __init__(self, model: nn.Module, batch: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for group in (model.parameters(), model.buffers()) for t in group}
        self._known |= {p.grad.untyped_storage()._cdata for p in model.parameters() if p.grad is not None}
        self._count(batch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._count(tree_iter(output))
        return output

    def _count(self, values: Iterable[Any]) -> None:
        for storage in [value.untyped_storage() for value in values if isinstance(value, Tensor)]:
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of Transformers, which the training run repeats."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def readable_size(number: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
