# SPDX-License-Identifier: Apache-2.0
"""The memory that a training step will take, worked out before anything is trained.

The forward pass is run on tensors without data, on which PyTorch says which of them it would keep for the backward
pass. So the estimate follows the model's real form: what is frozen, merged, adapted, checkpointed or autocast.
"""

import contextlib
import copy
import logging
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from .parts import part_of
from .trainer import leave_frozen_inputs

__all__ = ["MemoryEstimate", "estimate_memory", "readable_size"]

# Bytes of optimizer state for each parameter that learns; None is two states in the parameter's own type, as AdamW has.
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
    """Bytes on one device, before anything is sharded over several.

    Attributes:
        weights: parameters and buffers.
        gradients: of what learns.
        optimizer: its states.
        activations: what the forward pass keeps for the backward pass, for one batch of a device.
        working: what the backward pass needs beside, at its largest: the gradient of the logits, or with gradient
            checkpointing the activations of the largest block.
        peak: the most at any time. Not all of the above is there at once: gradients come as activations go.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    peak: int

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {readable_size(value)}"
            for name, value in (
                ("weights", self.weights),
                ("gradients", self.gradients),
                ("optimizer", self.optimizer),
                ("activations", self.activations),
                ("working memory", self.working),
            )
        )
        return f"about {readable_size(self.peak)} a device at the peak ({parts})"


def estimate_memory(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    optimizer: str = "adamw_torch",
    autocast: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    accumulates: bool = False,
) -> MemoryEstimate:
    """Return what a training step of a FastVLM takes.

    Not counted are the framework's own memory (0.5 GiB and more on a CUDA device), the allocator's fragmentation,
    copies that data parallel training keeps of gradients, and what data loading takes. Sharding divides weights,
    gradients and optimizer states by the number of devices.

    Args:
        model: a FastVLM, with adapters or without; not changed.
        batch: of the collator; only shapes count.
        optimizer: its name in `TrainingArguments.optim`.
        autocast: type that is computed in, if it is not that of the weights.
        gradient_checkpointing: whether activations are computed twice instead of kept.
        accumulates: whether an update takes several batches.

    Raises:
        RuntimeError: the model cannot be run without data, as when its weights are quantized, or ZeRO-3 has spread
            them over the devices.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RuntimeError("ZeRO-3 has spread its weights over the devices")
    gradients = {"before": 0, "after": 0}  # of the encoder and projector, and of the language model
    count = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            where = "after" if part_of(name) == "language_model" else "before"
            gradients[where] += parameter.numel() * parameter.element_size()
            count += parameter.numel()
    total = sum(gradients.values())
    state = _STATE_BYTES.get(optimizer)
    states = 2 * total if state is None else int(state * count)
    weights = sum(
        tensor.numel() * tensor.element_size() for group in (model.parameters(), model.buffers()) for tensor in group
    )
    kept, logits = _activations(model, batch, autocast, gradient_checkpointing)
    moments = (  # of the backward pass: its start, its arrival at the encoder, and its end
        kept.total + max(logits, kept.block) + (total if accumulates else 0),
        kept.vision + kept.vision_block + (total if accumulates else gradients["after"]),
        total,
    )
    return MemoryEstimate(
        weights=weights,
        gradients=total,
        optimizer=states,
        activations=kept.total,
        working=max(logits, kept.block, kept.vision_block),
        peak=weights + states + max(moments),
    )


@dataclass
class _Sizes:
    """Bytes that a forward pass keeps: up to the end of the projector and in all; and for checkpointed blocks, within
    the largest one of the encoder and of the language model, while it is computed again."""

    vision: int
    total: int
    vision_block: int = 0
    block: int = 0


def _activations(
    model: nn.Module, batch: Mapping[str, Tensor], autocast: torch.dtype | None, checkpointing: bool
) -> tuple[_Sizes, int]:
    """Return what the forward pass keeps, and the bytes of the gradient of the logits."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _without_data(model, mode)
    twin.train()
    with mode, _quiet():
        base: Any = getattr(twin, "get_base_model", lambda: twin)()
        fake = {name: mode.from_tensor(value) for name, value in batch.items() if isinstance(value, Tensor)}
        sizes, logits = _forward(base, fake, autocast)
        if checkpointing:
            _checkpoint(base)
            kept, _ = _forward(base, fake, autocast)
            sizes = _Sizes(kept.vision, kept.total, sizes.vision_block, sizes.block)
        else:
            sizes = _Sizes(sizes.vision, sizes.total)
    # The loss is computed in float32, and so is its gradient, which is then cast to the type of the logits.
    return sizes, logits.numel() * (4 + logits.element_size())


def _without_data(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of a model whose tensors have shapes, types and devices, but no memory."""
    held = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    tensors = {id(tensor): tensor for group in (model.parameters(), model.buffers(), held) for tensor in group}
    # deepcopy takes what the memo has for an object in place of a copy of it.
    return copy.deepcopy(model, {key: mode.from_tensor(tensor) for key, tensor in tensors.items()})


def _forward(base: Any, batch: Mapping[str, Tensor], autocast: torch.dtype | None) -> tuple[_Sizes, Tensor]:
    """Run the model in pieces, past its checks of values, and return the bytes kept and the logits."""
    kept = _Kept(base)
    ids, labels = batch["input_ids"], batch["labels"]
    casting = contextlib.nullcontext() if autocast is None else torch.autocast(ids.device.type, autocast)
    with kept, casting:
        embeds = base.get_input_embeddings()(torch.zeros_like(ids))
        if "pixel_values" in batch:
            features = base.model.vision_tower(batch["pixel_values"]).last_hidden_state
            features = base.model.multi_modal_projector(features.flatten(2).transpose(1, 2))
            mask = (ids == base.config.image_token_id).unsqueeze(-1)
            embeds = embeds.masked_scatter(mask, features.to(embeds.dtype))
        vision, vision_block = kept.total, kept.take_largest_block()
        hidden = base.model.language_model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        logits = base.lm_head(hidden)
        loss = base.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
    sizes = _Sizes(vision, kept.total, vision_block, kept.take_largest_block())
    del loss  # its graph held what was counted
    return sizes, logits


class _Kept:
    """Counts the storages that autograd saves, each once and none of the model's own, for as long as they exist.

    What is saved for a checkpointed block in which nothing needs a gradient is let go of at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._own = {t.untyped_storage()._cdata for group in (model.parameters(), model.buffers()) for t in group}
        self._saved: set[int] = set()
        self.total = self._largest_block = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_Kept":
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                before: list[int] = []
                hooks = (
                    module.register_forward_pre_hook(lambda *_, before=before: before.append(self.total)),
                    module.register_forward_hook(lambda *_, before=before: self._note_block(before.pop())),
                )
                for hook in hooks:
                    self._stack.callback(hook.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._saved:
            self._saved.add(storage._cdata)
            self.total += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return tensor

    def _forget(self, key: int, size: int) -> None:
        self._saved.discard(key)
        self.total -= size

    def take_largest_block(self) -> int:
        """Return what the largest block kept since this was last called."""
        largest, self._largest_block = self._largest_block, 0
        return largest

    def _note_block(self, before: int) -> None:
        self._largest_block = max(self._largest_block, self.total - before)


def _checkpoint(base: Any) -> None:
    # Named so from Transformers 5.23 on.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    leave_frozen_inputs(base)  # as FastVLMTrainer does


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep remarks about the cache and the like to the run itself."""
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
