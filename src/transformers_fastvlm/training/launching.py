# SPDX-License-Identifier: Apache-2.0
"""Runs on several devices: configurations for `accelerate launch`, and unsharded models."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .recipe_fields import did_you_mean

__all__ = ["launch_config", "list_launch_configs", "whole_models"]

_FOLDER = Path(__file__).parent / "configs"


def list_launch_configs() -> dict[str, str]:
    """Return the description of each configuration for `accelerate launch` in the package, by name."""
    found = {}
    for file in sorted(_FOLDER.glob("*.yaml")):
        lines = file.read_text("utf-8").splitlines()
        found[file.stem] = lines[1].removeprefix("# ")  # the line below the licence
    return found


def launch_config(name: str) -> Path:
    """Return the file of a configuration for `accelerate launch --config_file`.

    Args:
        name: "ddp", "fsdp2", "zero2" or "zero3" (`list_launch_configs`).

    Raises:
        FileNotFoundError: there is no configuration of this name.
    """
    names = list_launch_configs()
    if name not in names:
        raise FileNotFoundError(
            f"There is no configuration {name!r}{did_you_mean(name, names)} The package has {', '.join(names)}."
        )
    return _FOLDER / f"{name}.yaml"


@contextlib.contextmanager
def whole_models(trainer: Any) -> Iterator[None]:
    """Inside this context `from_pretrained` returns an unsharded model, even with ZeRO-3."""
    if not trainer.is_deepspeed_enabled:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(trainer.accelerator.state.deepspeed_plugin.hf_ds_config)
