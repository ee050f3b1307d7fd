# SPDX-License-Identifier: Apache-2.0
"""What makes vLLM know FastVLM: `vllm serve DIR` and `LLM(model=DIR)` work where this package is installed.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins` and
`transformers_fastvlm_entry.vllm_plugin`. Nothing here is imported without vLLM.
"""

import multiprocessing
import os
import threading
from typing import Any

__all__ = ["END_WITH_PARENT", "register"]

ARCHITECTURE = "FastVLMForConditionalGeneration"
MODE = "fastvlm"
END_WITH_PARENT = "FASTVLM_VLLM_ENDS_WITH_PARENT"
"""Environment variable: "1" has vLLM's processes end when the one that started them was killed."""

_WATCH = "fastvlm-parent"


def register() -> None:
    """Register FastVLM with vLLM; later calls change nothing.

    The weights run in this package's encoder and, through vLLM's Transformers backend, in Transformers' language model.
    Importing this module has imported the package, which made Transformers know FastVLM.

    Where `END_WITH_PARENT` says so, a process also watches the one that started it.

    Raises:
        ImportError: this version of vLLM lacks what is needed; docs/vllm.md has the versions that work.
    """
    if os.environ.get(END_WITH_PARENT) == "1":
        _end_with_parent()
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.renderers.registry import RENDERER_REGISTRY
        from vllm.tokenizers.registry import TokenizerRegistry

        if ARCHITECTURE not in ModelRegistry.models:
            ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
        if MODE not in RENDERER_REGISTRY.renderers:
            RENDERER_REGISTRY.register(MODE, f"{__name__}.renderer", "FastVLMRenderer")
        if MODE not in TokenizerRegistry.tokenizers:
            TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
        MODELS_CONFIG_MAP.setdefault(ARCHITECTURE, _Defaults)
    except Exception as error:
        raise ImportError(
            f"FastVLM could not be registered with this version of vLLM: {type(error).__name__}: {error}\n"
            "The versions that are known to work are in docs/vllm.md of transformers-fastvlm."
        ) from error


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone: vLLM's own outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == _WATCH for thread in threading.enumerate()):
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name=_WATCH, daemon=True).start()


class _Defaults:
    """What vLLM asks an architecture to change in its configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Change nothing."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Choose our renderer, which is vLLM's own with a check of its own, unless the user chose another."""
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = MODE
