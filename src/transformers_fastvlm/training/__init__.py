# SPDX-License-Identifier: Apache-2.0
"""Training on Hugging Face's `Trainer`: new models, recipes, parts that learn, checkpoints that survive."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .launching import launch_config, list_launch_configs
    from .lora import add_lora, lora_config, merge, quantization_config
    from .merging import load_llava_adapter, load_merged, merge_adapter
    from .models import new_model, save_model
    from .parts import PARTS, describe_parts, parameter_groups, set_trainable
    from .recipes import Recipe, list_recipes, load_recipe
    from .train_run import run
    from .trainer import FastVLMTrainer

_MODULE_OF = {
    "FastVLMTrainer": "trainer",
    "PARTS": "parts",
    "Recipe": "recipes",
    "add_lora": "lora",
    "describe_parts": "parts",
    "launch_config": "launching",
    "list_launch_configs": "launching",
    "list_recipes": "recipes",
    "load_llava_adapter": "merging",
    "load_merged": "merging",
    "load_recipe": "recipes",
    "lora_config": "lora",
    "merge": "lora",
    "merge_adapter": "merging",
    "new_model": "models",
    "parameter_groups": "parts",
    "quantization_config": "lora",
    "run": "train_run",
    "save_model": "models",
    "set_trainable": "parts",
}

__all__ = [
    "PARTS",
    "FastVLMTrainer",
    "Recipe",
    "add_lora",
    "describe_parts",
    "launch_config",
    "list_launch_configs",
    "list_recipes",
    "load_llava_adapter",
    "load_merged",
    "load_recipe",
    "lora_config",
    "merge",
    "merge_adapter",
    "new_model",
    "parameter_groups",
    "quantization_config",
    "run",
    "save_model",
    "set_trainable",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
