# SPDX-License-Identifier: Apache-2.0
"""Everything that makes Transformers know FastVLM, in one place.

`register()` runs when the package is imported, is cheap, does not import torch and may run any number of times.
Nearly every module of Transformers imports torch, so each registration waits until Transformers itself imports the
module that holds the mapping in question.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import transformers  # noqa: F401  (so that sys.modules has it)

NO_VISION2SEQ = "TRANSFORMERS_FASTVLM_NO_VISION2SEQ"
"""Set this environment variable to any text to keep `transformers.AutoModelForVision2Seq`, which Transformers 5 no
longer has, from being added."""


def register() -> None:
    """Register FastVLM with Transformers; later calls change nothing."""
    _offer_vision2seq()
    for name in _OUR_MODULES:
        _FINDER.watch(name)
    # Importing this module replaces sys.modules["transformers"] by a new object, which has to be told again.
    _after_import("transformers.processing_utils", lambda _: _offer_vision2seq())
    _after_import("transformers.models.auto.configuration_auto", _register_configurations)
    _after_import("transformers.conversion_mapping", _register_weight_renamings)
    _after_import("transformers.models.auto.modeling_auto", _register_models)
    _after_import("transformers.models.auto.image_processing_auto", _register_image_processors)
    _after_import("transformers.models.auto.processing_auto", _register_processors)


def _offer_vision2seq() -> None:
    """Let `from transformers import AutoModelForVision2Seq` find the class that `_register_models` defines."""
    if not os.environ.get(NO_VISION2SEQ):
        modules = sys.modules["transformers"]._class_to_module
        modules.setdefault("AutoModelForVision2Seq", "models.auto.modeling_auto")


def _register_configurations(module: ModuleType) -> None:
    from .configuration_fastvlm import FastViTHDConfig, FastVLMConfig, LlavaLlamaConfig, LlavaQwen2Config

    for config in (FastVLMConfig, FastViTHDConfig, LlavaQwen2Config, LlavaLlamaConfig):
        module.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_weight_renamings(module: ModuleType) -> None:
    from .checkpoints.layouts import apple_weight_renamings, encoder_weight_renamings

    module.register_checkpoint_conversion_mapping("fastvlm", apple_weight_renamings(), overwrite=True)
    module.register_checkpoint_conversion_mapping("fastvithd", encoder_weight_renamings(), overwrite=True)


def _register_models(module: ModuleType) -> None:
    from .configuration_fastvlm import FastViTHDConfig, FastVLMConfig
    from .modeling_fastvithd import FastViTHDBackbone, FastViTHDModel
    from .modeling_fastvlm import FastVLMForConditionalGeneration, FastVLMModel

    module.AutoModel.register(FastVLMConfig, FastVLMModel, exist_ok=True)
    module.AutoModel.register(FastViTHDConfig, FastViTHDModel, exist_ok=True)
    for auto_class in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForMultimodalLM"):
        getattr(module, auto_class).register(FastVLMConfig, FastVLMForConditionalGeneration, exist_ok=True)
    module.AutoBackbone.register(FastViTHDConfig, FastViTHDBackbone, exist_ok=True)
    # Past register(), which insists on one configuration a class: a backbone is also read out of a whole FastVLM.
    module.AutoBackbone._model_mapping.register(FastVLMConfig, FastViTHDBackbone, exist_ok=True)
    # Pipelines, `transformers serve` and the tests of models look into these dictionaries of names.
    names = {
        "MODEL_MAPPING_NAMES": "FastVLMModel",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "FastVLMForConditionalGeneration",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "FastVLMForConditionalGeneration",
    }
    for mapping, name in names.items():
        getattr(module, mapping)[FastVLMConfig.model_type] = name
    module.MODEL_MAPPING_NAMES[FastViTHDConfig.model_type] = "FastViTHDModel"
    if os.environ.get(NO_VISION2SEQ) or hasattr(module, "AutoModelForVision2Seq"):
        return

    class AutoModelForVision2Seq(module.AutoModelForImageTextToText):  # type: ignore[name-defined]
        """The name that `AutoModelForImageTextToText` had before Transformers 5."""

    AutoModelForVision2Seq.__module__ = module.__name__
    AutoModelForVision2Seq.__qualname__ = "AutoModelForVision2Seq"
    module.AutoModelForVision2Seq = AutoModelForVision2Seq  # type: ignore[attr-defined]


def _register_image_processors(module: ModuleType) -> None:
    from .configuration_fastvlm import FastVLMConfig
    from .image_processing_pil_fastvlm import FastVLMImageProcessorPil

    classes: dict[str, type] = {"pil": FastVLMImageProcessorPil}
    if importlib.util.find_spec("torchvision") is not None:
        from .image_processing_fastvlm import FastVLMImageProcessor

        classes["torchvision"] = FastVLMImageProcessor
    module.AutoImageProcessor.register(FastVLMConfig, image_processor_classes=classes, exist_ok=True)
    # Without a backend argument the Auto classes prefer torchvision; this list names the exceptions.
    if "FastVLMImageProcessor" not in module.DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS:
        module.DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS.append("FastVLMImageProcessor")


def _register_processors(module: ModuleType) -> None:
    from .configuration_fastvlm import FastVLMConfig
    from .processing_fastvlm import FastVLMProcessor

    module.AutoProcessor.register(FastVLMConfig, FastVLMProcessor, exist_ok=True)


def _after_import(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback` with the module called `name` as soon as it is imported and none of ours is half imported."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.watch(name)
    _FINDER.waiting.append((name, callback))
    _FINDER.call_those_ready()


class _PostImportFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, notes when it has been executed, and runs the callbacks that wait for it.

    Callbacks import modules of ours, and each of those imports modules of Transformers. Where one of ours came first,
    it is half done when Transformers' module is complete, so callbacks also wait until ours are.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[str, Callable[[ModuleType], None]]] = []
        self._watched: set[str] = set()
        self._executed: set[str] = set()

    def watch(self, name: str) -> None:
        """Note when the module called `name` has been executed, which may have been before."""
        module = sys.modules.get(name)
        if module is None:
            self._watched.add(name)
        elif not getattr(module.__spec__, "_initializing", False):
            self._executed.add(name)

    def executed(self, name: str) -> None:
        """Note that a module has been executed."""
        self._executed.add(name)
        self.call_those_ready()

    def call_those_ready(self) -> None:
        """Run every callback whose module is there, unless a module of ours is half imported."""
        if any(name in sys.modules and name not in self._executed for name in _OUR_MODULES):
            return
        for entry in [entry for entry in self.waiting if entry[0] in self._executed]:
            if entry in self.waiting:  # a callback may import what makes others ready
                self.waiting.remove(entry)
                entry[1](sys.modules[entry[0]])

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._watched:
            return None
        self._watched.discard(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _NotingLoader(spec.loader, self)
        return spec


class _NotingLoader(importlib.abc.Loader):
    """A loader that tells a finder when another loader has executed the module."""

    def __init__(self, loader: importlib.abc.Loader, finder: _PostImportFinder):
        self._loader, self._finder = loader, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader, for inspect and others that ask it for the source.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.executed(module.__name__)


_OUR_MODULES = tuple(
    f"{__package__}.{name}"
    for name in (
        "configuration_fastvlm",
        "image_processing_fastvlm",
        "image_processing_pil_fastvlm",
        "modeling_fastvithd",
        "modeling_fastvlm",
        "processing_fastvlm",
    )
)
_FINDER = _PostImportFinder()
