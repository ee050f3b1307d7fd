# SPDX-License-Identifier: Apache-2.0
"""Evaluation: the eleven benchmarks of the model card and a user's own questions, through lmms-eval."""

from .._optional import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "eval_run": "EvaluationOptions evaluate",
        "metrics": "METRICS score",
        "results": "EvaluationRun Sample TaskResult read_run",
    },
)
