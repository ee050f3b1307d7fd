# SPDX-License-Identifier: Apache-2.0
"""What other programs call before anybody has asked for FastVLM: the three entry points of the package.

Importing `transformers_fastvlm` imports torch, and fails where Transformers cannot be used. These run in the help of
the command `fastvlm` and in every process of vLLM and lmms-eval, whatever model it runs. So this module stands beside
the package and imports it inside its functions only.
"""

import logging
from typing import Any

__all__ = ["command", "lmms_eval_manifest", "registers_later", "vllm_plugin"]

logger = logging.getLogger(__name__)

registers_later = False
"""Whether the package leaves it to its importer to call `register()`. True in the command, whose verbs do."""

_MODEL_TYPES = ("fastvlm", "fastvithd", "llava_qwen2", "llava_llama")


def command() -> None:
    """Run the command `fastvlm`.

    Raises:
        SystemExit: always, with the exit code.
    """
    global registers_later
    registers_later = True
    from transformers_fastvlm.cli import main

    main()


def lmms_eval_manifest() -> Any:
    """Return lmms-eval's `ModelManifest` of the model `fastvlm`, which names the class and imports nothing of it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="fastvlm", chat_class_path="transformers_fastvlm.evaluation.lmms_model.FastVLM")


def vllm_plugin() -> None:
    """Register FastVLM with Transformers and vLLM, in a process of vLLM.

    Nothing is raised or logged above DEBUG, since most such processes run another model. Where it fails, loading the
    configuration of a FastVLM tries again, and raises what is wrong.
    """
    try:
        from transformers_fastvlm.vllm_plugin import register
    except Exception:
        logger.debug("FastVLM could not be registered", exc_info=True)
        _try_again_when_asked()
    else:
        register()


def _try_again_when_asked() -> None:
    """Let a FastVLM's configuration, once one is read, import the package and so register it or raise."""
    try:
        from transformers import AutoConfig, PreTrainedConfig

        for model_type in _MODEL_TYPES:
            AutoConfig.register(model_type, _late(model_type, PreTrainedConfig), exist_ok=True)
    except Exception:
        logger.debug("Transformers cannot be used", exc_info=True)


def _late(name: str, base: Any) -> Any:
    class LateConfig(base):
        """Stands for FastVLM's configuration until the package can be imported."""

        model_type = name

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            vllm_plugin_again()
            from transformers import CONFIG_MAPPING

            return CONFIG_MAPPING[name].from_dict(config_dict, **kwargs)

    return LateConfig


def vllm_plugin_again() -> None:
    from transformers_fastvlm.vllm_plugin import register

    register()
