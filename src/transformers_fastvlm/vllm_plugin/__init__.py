# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: with this package installed, `vllm serve DIR` and `LLM(model=DIR)` load FastVLM.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins` and
`transformers_fastvlm_entry.vllm_plugin`. Only vLLM imports this package.
"""

import multiprocessing
import os
import threading
from typing import Any

__all__ = ["END_WITH_PARENT", "register"]

ARCHITECTURE = "FastVLMForConditionalGeneration"
MODE = "fastvlm"
END_WITH_PARENT = "FASTVLM_VLLM_ENDS_WITH_PARENT"
"""Environment variable: "1" makes vLLM's processes exit when their parent is killed."""

_WATCH = "fastvlm-parent"


def register() -> None:
    """Register FastVLM with vLLM; later calls change nothing.

    vLLM runs this package's encoder and, through its Transformers backend, Transformers' language model. Importing this
    module also imports the package, which registers FastVLM with Transformers.

    If `END_WITH_PARENT` is set, each process also watches its parent.

    Raises:
        ImportError: this version of vLLM is not supported; docs/vllm.md lists the supported versions.
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
            "docs/vllm.md of transformers-fastvlm lists the supported versions."
        ) from error


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone: vLLM's processes would outlive a killed parent."""
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == _WATCH for thread in threading.enumerate()):
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name=_WATCH, daemon=True).start()


class _Defaults:
    """Changes of vLLM's configuration for this architecture."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Change nothing."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Select our renderer, which adds a check to vLLM's, unless the user chose another one."""
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = MODE
