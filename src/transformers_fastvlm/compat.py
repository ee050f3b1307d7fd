# SPDX-License-Identifier: Apache-2.0
"""Differences between the supported versions of Transformers. Only this module checks versions or probes names.

Each item names the version after which it can be deleted.
"""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, ProcessorMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ._version import __version__

VERSION = str(transformers.__version__)
_VERSION = Version(VERSION)

TESTED = "5.16.1 to 5.24"
"""Tested versions of Transformers; setup.cfg declares the same range."""


def _takes(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


CACHE_NAMES = ("cache", "past_key_values")
"""Names of the argument and output with the keys and values of earlier tokens. Delete the second, which Transformers
< 5.24 uses, with support for these versions."""

CACHE = next((name for name in CACHE_NAMES if name in _takes(GenerationMixin.prepare_inputs_for_generation)), "cache")
"""The name that generate() uses. Becomes "cache" when support for Transformers < 5.24 ends."""


PAGES_COME_AS_CACHE = CACHE == "past_key_values"
"""Delete with support for Transformers < 5.24, whose continuous batching passes its paged cache as `cache`, for the
attention functions and not for the layers."""


def cache_argument(language_model: Any) -> str:
    """Return the name of a language model's cache argument.

    Language models ignore unknown keywords. A renamed argument would therefore give wrong answers and no error, so this
    function checks every argument that FastVLM passes.

    Raises:
        RuntimeError: the forward method lacks an argument; the message names the tested versions.
    """
    kind = type(language_model)
    taken = _takes(kind.forward)
    missing = [name for name in ("attention_mask", "position_ids", "inputs_embeds") if name not in taken]
    found = next((name for name in CACHE_NAMES if name in taken), None)
    if missing or found is None:
        raise RuntimeError(
            f"{kind.__name__}.forward of Transformers {_VERSION} has no argument {(missing or CACHE_NAMES[:1])[0]!r}; "
            f"transformers-fastvlm {__version__} is tested with Transformers {TESTED}. Install one of these versions, "
            "or upgrade transformers-fastvlm."
        )
    return found


TEMPLATE_ARGUMENTS = _takes(ProcessorMixin.apply_chat_template)
"""Arguments of `apply_chat_template`; other keywords are passed to the processor."""

SANITIZES_CONTROL_TOKENS = "sanitize_control_tokens" in TEMPLATE_ARGUMENTS
"""Delete with support for Transformers < 5.23, whose processors treat control tokens in a user's text as real ones."""


def slice_logits_to_keep(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return the hidden states of the positions whose logits are requested.

    Delete with support for Transformers < 5.21, where `transformers.modeling_utils` has no function of this name.

    Args:
        hidden_states: (batch, length, hidden_size).
        logits_to_keep: the number of last positions, 0 for all; integer indices (positions,) for all rows or
            (batch, positions) for each row; or a boolean mask (batch, length).

    Returns:
        (batch, positions, hidden_size); with a boolean mask (true positions, hidden_size).
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 2 and logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


GENERATE_KEEPS_ENCODER_OUTPUTS = _VERSION < Version("5.20.0.dev0")
"""Delete with support for Transformers < 5.20, whose generate() does not encode images before it expands a batch and
keeps the encoder's outputs after the first step."""

ADAPTERS_LOSE_WHOLE_PARTS = _VERSION < Version("5.19.0.dev0")
"""Delete with support for Transformers < 5.19, whose from_pretrained() ignores an adapter's fully trained modules
(peft's `modules_to_save`)."""


def check_adapters(model: Any) -> None:
    """Refuse a model whose adapter was loaded incompletely.

    Raises:
        ValueError: the adapter has fully trained modules, and this version of Transformers ignores them.
    """
    configs = getattr(model, "peft_config", {}).values() if ADAPTERS_LOSE_WHOLE_PARTS else ()
    if parts := [part for config in configs for part in config.modules_to_save or ()]:
        raise ValueError(
            f"The adapter comes with a trained {parts[0]}, which Transformers {_VERSION} ignores; expected 5.19 or "
            "later. Merge the adapter (fastvlm merge), or load it with transformers_fastvlm.training.load_merged."
        )


def encode_and_expand_images(
    model: Any, expand_size: int, input_ids: Tensor | None, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Encode images once and repeat each row's group of images `expand_size` times.

    Transformers < 5.20 repeats `pixel_values` image by image: with several images per prompt, the copies of a prompt
    get the wrong images.

    Args:
        model: a `FastVLMForConditionalGeneration`.
        expand_size: copies of each row.
        input_ids: (batch, length) before expansion, or empty if `model_kwargs` has `inputs_embeds`.
        model_kwargs: generate()'s arguments; `pixel_values`, `image_sizes` and `num_tiles` are removed.

    Returns:
        The arguments with `mm_encoder_outputs` instead.
    """
    images = {key: model_kwargs.pop(key, None) for key in ("pixel_values", "image_sizes", "num_tiles")}
    features = model.get_image_features(**images, return_dict=True).pooler_output
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is not None:
        input_ids = None
    if expand_size > 1:
        per_row = model.model.get_placeholder_mask(input_ids, embeds).sum(-1).tolist()
        groups, first = [], 0
        for tokens in per_row:
            last = first
            while tokens > 0 and last < len(features):
                tokens -= len(features[last])
                last += 1
            groups.append(list(features[first:last]))
            first = last
        expanded = [image for group in groups for _ in range(expand_size) for image in group]
        features = torch.stack(expanded) if isinstance(features, Tensor) and expanded else expanded
    return model_kwargs | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Transformers' continuous batching: before 5.19 it warns of every attention but flash, and without psutil
    of memory that it does not measure, though the size of the cache is given."""
    log = logging.getLogger("ContinuousBatchingLogger")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@_quiet()
def open_pages(model: Any, processors: LogitsProcessorList, *, page_tokens: int, **options: Any) -> tuple[Any, Any]:
    """Return the manager and the batch processor of Transformers' continuous batching; the manager is not started.

    PyTorch's random state is left as it is, and so is the attention of the encoder. The language model's attention may
    be another afterwards; `close_pages` restores it.

    Args:
        model: a `FastVLMForConditionalGeneration`.
        processors: processors of scores, called with (rows,) token ids and (rows, vocabulary) scores.
        page_tokens: tokens of a page.
        **options: of `ContinuousBatchingConfig`.
    """
    # Here, since these modules are slow to import and only engines need them.
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    taken = _takes(ContinuousBatchingConfig)
    options |= {"page_size" if "page_size" in taken else "block_size": page_tokens}  # < 5.17: block_size
    if "auto_switch_to_flash" in taken:  # from 5.19 on
        options["auto_switch_to_flash"] = False
    config = ContinuousBatchingConfig(
        max_blocks_per_request=0,
        use_async_batching=False,  # an answer's end is known before the next step
        use_cuda_graph=False,  # tokens are chosen by Python code
        **options,
    )
    before = model.config._attn_implementation
    manager = ContinuousBatchingManager(model, GenerationConfig(eos_token_id=-1), config)
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(processors)
    # Before 5.19 the cache is made for the whole configuration, which has no attention heads.
    text = model.config.get_text_config()
    manager.model = SimpleNamespace(config=text, device=model.device, dtype=model.dtype)
    paged = model.config._attn_implementation
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            processor = manager._create_batch_processor()
    finally:
        if paged != before:
            model.set_attn_implementation(before)
    if paged != before:
        model.get_decoder().set_attn_implementation(paged)
    return manager, processor


def check_pages(model: Any) -> None:
    """Raise ValueError if Transformers cannot page the cache of the language model."""
    attention = model.config._attn_implementation or ""
    if attention not in ("eager", "sdpa") and "flash" not in attention:
        raise ValueError(f"attn_implementation is {attention!r}; expected eager, sdpa or flash attention")
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if others := layers - {"full_attention", "sliding_attention"}:
        raise ValueError(f"it has layers of the types {sorted(others)}")


def close_pages(model: Any) -> None:
    """Restore the language model's attention after `open_pages`."""
    attention = model.config._attn_implementation
    if model.get_decoder().config._attn_implementation != attention:
        model.get_decoder().set_attn_implementation(attention)


@contextlib.contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Restore the language model's attention for a while."""
    paged = model.get_decoder().config._attn_implementation
    close_pages(model)
    try:
        yield
    finally:
        if model.get_decoder().config._attn_implementation != paged:
            model.get_decoder().set_attn_implementation(paged)


def forget_renamings(model: Any) -> None:
    """Let a model that was loaded under ZeRO-3 be saved with its usual tensor names.

    Delete when Transformers under ZeRO-3 also remembers only the renamings that loading used; 5.23 remembers and
    reverses all it knows, including old ones of other models.
    """
    if is_deepspeed_zero3_enabled():
        model._weight_conversions = None  # saving then uses this package's renamings, as for a model never loaded
