# SPDX-License-Identifier: Apache-2.0
"""FastVLM for Transformers: after `import transformers_fastvlm`, Auto classes, generate() and pipelines know FastVLM.

Importing the package registers the model, which imports torch and Transformers' models. Only the command `fastvlm`
registers later, when a verb runs, so that its help appears at once.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .registration import register

if TYPE_CHECKING:
    from .configuration_fastvlm import FastViTHDConfig, FastVLMConfig
    from .image_processing_fastvlm import FastVLMImageProcessor
    from .image_processing_pil_fastvlm import FastVLMImageProcessorPil
    from .modeling_fastvithd import FastViTHDBackbone, FastViTHDModel
    from .modeling_fastvlm import FastVLMForConditionalGeneration, FastVLMModel
    from .processing_fastvlm import FastVLMProcessor

_MODULE_OF = {
    "FastViTHDBackbone": "modeling_fastvithd",
    "FastViTHDConfig": "configuration_fastvlm",
    "FastViTHDModel": "modeling_fastvithd",
    "FastVLMConfig": "configuration_fastvlm",
    "FastVLMForConditionalGeneration": "modeling_fastvlm",
    "FastVLMImageProcessor": "image_processing_fastvlm",
    "FastVLMImageProcessorPil": "image_processing_pil_fastvlm",
    "FastVLMModel": "modeling_fastvlm",
    "FastVLMProcessor": "processing_fastvlm",
}

__all__ = [
    "FastViTHDBackbone",
    "FastViTHDConfig",
    "FastViTHDModel",
    "FastVLMConfig",
    "FastVLMForConditionalGeneration",
    "FastVLMImageProcessor",
    "FastVLMImageProcessorPil",
    "FastVLMModel",
    "FastVLMProcessor",
    "__version__",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not getattr(sys.modules.get("transformers_fastvlm_entry"), "registers_later", False):
    register()
