# SPDX-License-Identifier: Apache-2.0
"""Training with Hugging Face's `Trainer`: new models, recipes, trainable parts, atomic checkpoints."""

from typing import TYPE_CHECKING

from .._optional import lazy_names

if TYPE_CHECKING:
    from .launching import launch_config, list_launch_configs
    from .lora import add_lora, lora_config, merge, quantization_config
    from .merging import load_llava_adapter, load_merged, merge_adapter
    from .models import new_model, save_model
    from .parts import PARTS, describe_parts, parameter_groups, set_trainable
    from .recipes import Recipe, list_recipes, load_recipe
    from .train_run import run
    from .trainer import FastVLMTrainer

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "launching": "launch_config list_launch_configs",
        "lora": "add_lora lora_config merge quantization_config",
        "merging": "load_llava_adapter load_merged merge_adapter",
        "models": "new_model save_model",
        "parts": "PARTS describe_parts parameter_groups set_trainable",
        "recipes": "Recipe list_recipes load_recipe",
        "train_run": "run",
        "trainer": "FastVLMTrainer",
    },
)
