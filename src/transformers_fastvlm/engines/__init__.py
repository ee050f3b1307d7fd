# SPDX-License-Identifier: Apache-2.0
"""What generates the answers of the tools: one interface, over Transformers or vLLM."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Answer, Conversation, Engine, Sampling
    from .transformers import TransformersEngine
    from .vllm import VllmEngine

_MODULE_OF = {
    "Answer": "base",
    "Conversation": "base",
    "Engine": "base",
    "Sampling": "base",
    "TransformersEngine": "transformers",
    "VllmEngine": "vllm",
}

ENGINES = ("transformers", "vllm")
"""Names that `load_engine` takes."""

__all__ = ["ENGINES", "Answer", "Conversation", "Engine", "Sampling", "TransformersEngine", "VllmEngine", "load_engine"]


def load_engine(name: str, model: str, **options: Any) -> "Engine":
    """Load a model into an engine.

    Args:
        name: "transformers" or "vllm".
        model: directory or hub repository of a FastVLM checkpoint.
        **options: of the engine, such as `dtype` and `device`; see `TransformersEngine` and `VllmEngine`.

    Raises:
        ValueError: no engine of that name, or a checkpoint or an option that it cannot use.
        ImportError: the engine's package is not installed.
        OSError: there is no such checkpoint, or its files are damaged.
    """
    if name == "transformers":
        from .transformers import TransformersEngine

        return TransformersEngine(model, **options)
    if name == "vllm":
        from .vllm import VllmEngine

        return VllmEngine(model, **options)
    raise ValueError(f"engine is {name!r}; expected one of {', '.join(ENGINES)}.")


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
