# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint with a chosen device, dtype and image size."""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..checkpoints.adapters import attach, base_of_adapter, merge
from ..checkpoints.embedded import resolve_model
from ..configuration_checks import check_directory
from ..images.anyres import scaled_pinpoints
from ..tokens import IMAGE_TOKEN

__all__ = ["DTYPES", "check_dtype", "check_tokenizer", "find_device", "image_options", "load_model"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless a dtype is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")


def find_device(name: str, option: str = "device") -> torch.device:
    """Return the device of a name and check that it is available.

    Args:
        name: "auto" (CUDA, else Apple's GPU, else the CPU) or a torch device, such as "cuda:1".
        option: name of the option in error messages.

    Raises:
        ValueError: torch does not know the device, or it is not available.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    expected = "Expected auto, cpu, cuda (or cuda:1 and so on) or mps."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{option} is {name!r}, which torch does not know. {expected}") from error
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{option} is {name!r}, which is not available here (torch {torch.__version__}). {expected}"
        ) from error
    return device


def image_options(config: Any, size: int | None) -> dict[str, Any]:
    """Return the image processor's options for another size; AnyRes grids scale with the size, as the model expects.

    Args:
        config: the `FastVLMConfig`.
        size: height and width in pixels; None for the checkpoint's size, which needs no options.
    """
    if size is None:
        return {}
    options: dict[str, Any] = {"size": {"height": size, "width": size}}
    if config.image_aspect_ratio == "anyres":
        own = config.vision_config.image_size
        options["image_grid_pinpoints"] = scaled_pinpoints(config.image_grid_pinpoints, own, size)
    return options


def load_model(model: str, device: torch.device, dtype: str = "auto", size: int | None = None) -> tuple[Any, Any]:
    """Return a `FastVLMForConditionalGeneration`, ready to answer, and its `FastVLMProcessor`.

    Args:
        model: directory or hub repository, or "tiny"; or the directory of a LoRA adapter of peft, which is merged into
            the base model that its adapter_config.json names.
        device: device of the model; see `find_device`.
        dtype: one of `DTYPES`. "auto" is the checkpoint's dtype, but float32 for a float16 checkpoint on a CPU.
        size: height and width, in pixels, that images are resized to, a multiple of 64; None for the checkpoint's.

    Raises:
        ImportError: the model is an adapter, but peft is not installed.
        ValueError: an invalid option, files of different checkpoints, an invalid config.json, or an adapter that does
            not fit its base model.
        OSError: there is no such checkpoint, or its files are damaged.
    """
    check_dtype(dtype)
    source = resolve_model(model)
    adapter = source if (base := base_of_adapter(source)) else None
    source = base or source
    if os.path.isdir(source):
        check_directory(source)
    config: Any = AutoConfig.from_pretrained(source)
    trained = adapter if adapter and os.path.isfile(os.path.join(adapter, "processor_config.json")) else None
    processor: Any = AutoProcessor.from_pretrained(trained or source, **image_options(config, size))
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        source, dtype="auto" if dtype == "auto" else getattr(torch, dtype)
    )
    if dtype == "auto" and device.type == "cpu" and loaded.dtype == torch.float16:
        loaded = loaded.float()
    if adapter:
        loaded = merge(attach(loaded, adapter))
        if trained and size is None:  # it may have been trained at another resolution
            loaded.config.vision_config.image_size = processor.image_processor.size["height"]
    loaded = loaded.to(device).eval()
    # Drop the settings of generation_config.json that no tool here can pass on and that None in a call cannot undo.
    for name in ("num_beam_groups", "penalty_alpha", "prefill_chunk_size", "early_stopping", "length_penalty"):
        if getattr(loaded.generation_config, name, None) is not None:
            setattr(loaded.generation_config, name, None)
    check_tokenizer(model, loaded.config, processor)
    return loaded, processor


def check_tokenizer(name: str, config: Any, processor: Any) -> None:
    """Check that a checkpoint's tokenizer fits its `FastVLMConfig`.

    Args:
        name: of the checkpoint, for messages.

    Raises:
        ValueError: the tokenizer has ids without an embedding in the model (<image> needs none), or another id of
            <image>.
    """
    rows = config.text_config.vocab_size
    own = {token: index for token, index in processor.tokenizer.get_vocab().items() if token != IMAGE_TOKEN}
    token, highest = max(own.items(), key=lambda item: item[1])
    if highest >= rows:
        raise ValueError(
            f"{name!r}: the tokenizer gives {token!r} the id {highest}, but the model has embeddings for 0 to "
            f"{rows - 1} (vocab_size in config.json). The files belong to different checkpoints, or tokens were added "
            "without model.resize_token_embeddings."
        )
    if config.image_token_id != processor.image_token_id:
        raise ValueError(
            f"{name!r}: config.json has image_token_id {config.image_token_id}, but {IMAGE_TOKEN} is "
            f"{processor.image_token_id} in the tokenizer. The files belong to different checkpoints."
        )
