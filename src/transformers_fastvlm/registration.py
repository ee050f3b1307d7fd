# SPDX-License-Identifier: Apache-2.0
"""Registration of FastVLM with Transformers.

`register()` runs when the package is imported. Every run makes all calls of Transformers' public `register` methods and
keeps no state, so the next import repairs an interrupted or failed one. Importing this module is cheap; `register()`
imports torch and the model.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

__all__ = ["NO_VISION2SEQ", "register"]

NO_VISION2SEQ = "TRANSFORMERS_FASTVLM_NO_VISION2SEQ"
"""If this environment variable is set, `transformers.AutoModelForVision2Seq`, which Transformers 5 removed, is not
added."""

_DISTRIBUTION = "transformers-fastvlm"


def register() -> None:
    """Register FastVLM with Transformers; calling it again repeats the same registrations.

    The classes also become attributes of `transformers`, where TRL and vLLM look up the class name of a checkpoint's
    configuration.

    Raises:
        ImportError: the installed Transformers, torch or torchvision does not work; the message names their versions.
    """
    try:
        _register()
    except Exception as error:
        raise ImportError(_explanation(error), name=_DISTRIBUTION) from error


def _register() -> None:
    from .configuration_fastvlm import FastViTHDConfig, FastVLMConfig, LlavaLlamaConfig, LlavaQwen2Config
    from .image_processing_pil_fastvlm import FastVLMImageProcessorPil
    from .modeling_fastvithd import FastViTHDBackbone, FastViTHDModel
    from .modeling_fastvlm import FastVLMForConditionalGeneration, FastVLMModel
    from .processing_fastvlm import FastVLMProcessor

    image_processors: dict[str, type] = {"pil": FastVLMImageProcessorPil}
    if importlib.util.find_spec("torchvision") is not None:
        from .image_processing_fastvlm import FastVLMImageProcessor

        image_processors["torchvision"] = FastVLMImageProcessor

    _register_models()
    _register_processors(image_processors)
    models = (FastVLMForConditionalGeneration, FastVLMModel, FastViTHDBackbone, FastViTHDModel)
    processors = (FastVLMProcessor, *image_processors.values())
    for cls in (FastVLMConfig, FastViTHDConfig, *models, *processors):
        _offer(cls.__name__, cls)
    # Last, because the Auto classes look a model up by its configuration: by now everything else is registered.
    from transformers.models.auto.configuration_auto import AutoConfig

    for config in (FastVLMConfig, FastViTHDConfig, LlavaQwen2Config, LlavaLlamaConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models() -> None:
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.models.auto import modeling_auto

    from .checkpoints.layouts import apple_weight_renamings, encoder_weight_renamings
    from .configuration_fastvlm import FastViTHDConfig, FastVLMConfig
    from .modeling_fastvithd import FastViTHDBackbone, FastViTHDModel
    from .modeling_fastvlm import FastVLMForConditionalGeneration, FastVLMModel

    register_checkpoint_conversion_mapping("fastvlm", apple_weight_renamings(), overwrite=True)
    register_checkpoint_conversion_mapping("fastvithd", encoder_weight_renamings(), overwrite=True)
    modeling_auto.AutoModel.register(FastVLMConfig, FastVLMModel, exist_ok=True)
    modeling_auto.AutoModel.register(FastViTHDConfig, FastViTHDModel, exist_ok=True)
    for name in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForMultimodalLM"):
        getattr(modeling_auto, name).register(FastVLMConfig, FastVLMForConditionalGeneration, exist_ok=True)
    modeling_auto.AutoBackbone.register(FastViTHDConfig, FastViTHDBackbone, exist_ok=True)
    # Not through AutoBackbone, which accepts one configuration per class: a whole FastVLM also loads as a backbone.
    modeling_auto.MODEL_FOR_BACKBONE_MAPPING.register(FastVLMConfig, FastViTHDBackbone, exist_ok=True)
    # Pipelines, `transformers serve` and Transformers' model tests use these dictionaries of names.
    for mapping, name in {
        "MODEL_MAPPING_NAMES": "FastVLMModel",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "FastVLMForConditionalGeneration",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "FastVLMForConditionalGeneration",
    }.items():
        getattr(modeling_auto, mapping)[FastVLMConfig.model_type] = name
    modeling_auto.MODEL_MAPPING_NAMES[FastViTHDConfig.model_type] = "FastViTHDModel"
    _offer_vision2seq(modeling_auto)


def _register_processors(image_processors: dict[str, type]) -> None:
    from transformers.models.auto.processing_auto import AutoProcessor

    from .configuration_fastvlm import FastVLMConfig
    from .processing_fastvlm import FastVLMProcessor

    # In Transformers 5.16 without torchvision, the parent's attribute of this name is a dummy that raises.
    image_processing_auto = importlib.import_module("transformers.models.auto.image_processing_auto")
    image_processing_auto.AutoImageProcessor.register(
        FastVLMConfig, image_processor_classes=image_processors, exist_ok=True
    )
    # Without a backend argument the Auto classes prefer torchvision; this list names the exceptions.
    if "FastVLMImageProcessor" not in image_processing_auto.DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS:
        image_processing_auto.DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS.append("FastVLMImageProcessor")
    AutoProcessor.register(FastVLMConfig, FastVLMProcessor, exist_ok=True)


def _offer_vision2seq(module: ModuleType) -> None:
    """Make `from transformers import AutoModelForVision2Seq` work, and pickling of that class."""
    name = "AutoModelForVision2Seq"
    if os.environ.get(NO_VISION2SEQ):
        return
    if not hasattr(module, name):
        vision2seq = type(
            name,
            (module.AutoModelForImageTextToText,),
            {
                "__doc__": "The name that `AutoModelForImageTextToText` had before Transformers 5.",
                "__module__": module.__name__,
            },
        )
        vars(module).setdefault(name, vision2seq)  # another thread may have added it
    _offer(name, getattr(module, name))


def _offer(name: str, value: Any) -> None:
    """Make `value` an attribute of `transformers`, unless Transformers has one of that name.

    Importing transformers.processing_utils replaces the object in sys.modules["transformers"]. Modules that imported
    Transformers earlier still hold the old object, so both get the attribute.
    """
    holders = [object.__getattribute__(module, "__dict__") for module in list(sys.modules.values()) if module]
    for holder in (sys.modules, *holders):
        found = holder.get("transformers")
        if isinstance(found, ModuleType) and found.__name__ == "transformers" and not hasattr(found, name):
            setattr(found, name, value)


def _explanation(error: Exception) -> str:
    """Return a message with the installed and the expected versions and the error."""
    installed = []
    for package in ("transformers", "torch", "torchvision"):
        try:
            installed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        declared = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        declared = []
    tested = next((line for line in declared if line.startswith("transformers")), "the tested transformers")
    return (
        f"FastVLM cannot be registered with Transformers: {type(error).__name__}: {' '.join(str(error).split())}\n"
        f"Installed: {', '.join(installed)}; expected: {tested}, and matching versions of torch and torchvision.\n"
        "Install these versions, or a newer transformers-fastvlm."
    )
