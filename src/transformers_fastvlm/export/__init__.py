# SPDX-License-Identifier: Apache-2.0
"""Export of a model to the files of another runtime, with a model card that states their error."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export_run import Export, export
    from .export_source import Source
    from .targets import TARGETS, ExportOptions, Report, Target

_MODULE_OF = {
    "Export": "export_run",
    "ExportOptions": "targets",
    "Report": "targets",
    "Source": "export_source",
    "TARGETS": "targets",
    "Target": "targets",
    "export": "export_run",
}

__all__ = ["Export", "ExportOptions", "Report", "Source", "TARGETS", "Target", "export"]


def __getattr__(name: str) -> Any:
    # The command's help reads the table of targets and must not import torch.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
