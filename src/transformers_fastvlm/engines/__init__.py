# SPDX-License-Identifier: Apache-2.0
"""Engines generate the answers of all tools: one interface over Transformers, vLLM, onnxruntime and llama.cpp."""

import importlib
from typing import TYPE_CHECKING, Any

from .openmp import OpenMPThreads

if TYPE_CHECKING:
    from .answer_schema import Schema
    from .base import Answer, Conversation, PromptTooLong, Sampling, TokenLogprob
    from .engine import Engine
    from .llamacpp_engine import LlamaCppEngine
    from .onnx_engine import OnnxEngine
    from .prompts import Prompt
    from .request import Request
    from .transformers_engine import TransformersEngine
    from .vllm_engine import VllmEngine

_MODULE_OF = {
    "Answer": "base",
    "Conversation": "base",
    "Engine": "engine",
    "LlamaCppEngine": "llamacpp_engine",
    "OnnxEngine": "onnx_engine",
    "Prompt": "prompts",
    "PromptTooLong": "base",
    "Request": "request",
    "Sampling": "base",
    "Schema": "answer_schema",
    "TokenLogprob": "base",
    "TransformersEngine": "transformers_engine",
    "VllmEngine": "vllm_engine",
}

_CLASS_OF = {
    "transformers": "TransformersEngine",
    "vllm": "VllmEngine",
    "onnx": "OnnxEngine",
    "llamacpp": "LlamaCppEngine",
}

ENGINES = tuple(_CLASS_OF)
"""Names that `load_engine` takes."""

__all__ = [
    "ENGINES",
    "Answer",
    "Conversation",
    "Engine",
    "LlamaCppEngine",
    "OnnxEngine",
    "Prompt",
    "PromptTooLong",
    "Request",
    "Sampling",
    "Schema",
    "TokenLogprob",
    "TransformersEngine",
    "VllmEngine",
    "engine_class",
    "load_engine",
]


def engine_class(engine: str) -> "type[Engine]":
    """Return the class of an engine; its signature lists the engine's options.

    Args:
        engine: one of `ENGINES`.

    Raises:
        ValueError: unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}.")
    found: type[Engine] = __getattr__(_CLASS_OF[engine])
    return found


def load_engine(engine: str, model: str, **options: Any) -> "Engine":
    """Load a model into an engine.

    Args:
        engine: "transformers", "vllm", "onnx" or "llamacpp".
        model: directory or hub repository of a FastVLM checkpoint, or "tiny"; for "onnx" and "llamacpp", the directory
            of `fastvlm export onnx` and of `fastvlm export gguf`.
        **options: options such as `dtype` and `device`; see `TransformersEngine`, `VllmEngine`, `OnnxEngine` and
            `LlamaCppEngine`.

    Raises:
        ValueError: unknown engine, or it cannot use the checkpoint or an option.
        ImportError: the engine's package is not installed.
        OSError: there is no such checkpoint, or its files are damaged.
    """
    make: Any = engine_class(engine)
    loaded: Engine = make(model, **options)
    OpenMPThreads().release()
    return loaded


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
