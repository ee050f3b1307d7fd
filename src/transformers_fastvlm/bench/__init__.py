# SPDX-License-Identifier: Apache-2.0
"""Speed and memory: where the time to the first token goes, beside other implementations, models
and engines."""

from .._optional import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "bench_plots": "write_plots",
        "bench_run": "run",
        "cases": "Options",
        "encoders": "run_encoders",
        "engine_cases": "EngineCase EngineOptions",
        "engines_run": "run_engines",
        "photo": "make_photo photo_jpeg",
    },
)
