# SPDX-License-Identifier: Apache-2.0
"""Evaluation: the eleven benchmarks of the model card and a user's own questions, through lmms-eval."""

import importlib
from typing import Any

__all__ = ["METRICS", "EvaluationOptions", "EvaluationRun", "Sample", "TaskResult", "evaluate", "read_run", "score"]

_MODULE_OF = {
    "METRICS": "metrics",
    "EvaluationOptions": "eval_run",
    "EvaluationRun": "results",
    "Sample": "results",
    "TaskResult": "results",
    "evaluate": "eval_run",
    "read_run": "results",
    "score": "metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
