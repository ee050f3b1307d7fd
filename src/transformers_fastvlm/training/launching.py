# SPDX-License-Identifier: Apache-2.0
"""The same run on several devices: configurations for `accelerate launch`, and models that are not spread."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .recipe_fields import did_you_mean

__all__ = ["launch_config", "list_launch_configs", "whole_models"]

_FOLDER = Path(__file__).parent / "configs"


def list_launch_configs() -> dict[str, str]:
    """Return what each configuration for `accelerate launch` that comes with the package is for, by name."""
    found = {}
    for file in sorted(_FOLDER.glob("*.yaml")):
        lines = file.read_text("utf-8").splitlines()
        found[file.stem] = lines[1].removeprefix("# ")  # under the licence
    return found


def launch_config(name: str) -> Path:
    """Return the file of a configuration for `accelerate launch --config_file`.

    Args:
        name: "ddp", "fsdp2", "zero2" or "zero3" (`list_launch_configs`).

    Raises:
        FileNotFoundError: there is none of this name.
    """
    names = list_launch_configs()
    if name not in names:
        raise FileNotFoundError(
            f"There is no configuration {name!r}{did_you_mean(name, names)} The package's are {', '.join(names)}."
        )
    return _FOLDER / f"{name}.yaml"


@contextlib.contextmanager
def whole_models(trainer: Any) -> Iterator[None]:
    """Within, `from_pretrained` gives this process a whole model, also while ZeRO-3 spreads models over all."""
    if not trainer.is_deepspeed_enabled:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(trainer.accelerator.state.deepspeed_plugin.hf_ds_config)
