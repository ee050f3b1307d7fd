# SPDX-License-Identifier: Apache-2.0
"""The three entry points of the package, which other programs call even if FastVLM is not used.

Importing `transformers_fastvlm` imports torch, and fails if Transformers cannot be used. But entry points run
for the help of `fastvlm`, and in every process of vLLM and lmms-eval, with any model. So this module lies outside the
package and imports it inside functions only.
"""

import logging
from typing import Any

__all__ = ["command", "lmms_eval_manifest", "registers_later", "vllm_plugin"]

logger = logging.getLogger(__name__)

registers_later = False
"""Whether importing the package leaves out `register()`. True in the command, whose verbs call it."""

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

    Nothing is raised or logged above DEBUG, since most such processes run another model. If it fails, reading
    the configuration of a FastVLM tries again and raises the error.
    """
    try:
        _register_with_vllm()
    except Exception:
        logger.debug("FastVLM could not be registered; reading its configuration tries again", exc_info=True)
        try:
            _try_again_when_asked()
        except Exception:
            logger.debug("Transformers cannot be used", exc_info=True)


def _register_with_vllm() -> None:
    from transformers_fastvlm.vllm_plugin import register

    register()


def _try_again_when_asked() -> None:
    """Register stand-ins of the configurations, which import the package as soon as one is read."""
    from transformers import AutoConfig, PreTrainedConfig

    class _Late(PreTrainedConfig):
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            _register_with_vllm()
            from transformers import CONFIG_MAPPING

            import transformers_fastvlm

            transformers_fastvlm.register()  # replaces these by the real configurations

            return CONFIG_MAPPING[cls.model_type].from_dict(config_dict, **kwargs)

    for model_type in _MODEL_TYPES:
        late = type("LateFastVLMConfig", (_Late,), {"model_type": model_type, "__module__": __name__})
        AutoConfig.register(model_type, late, exist_ok=True)
