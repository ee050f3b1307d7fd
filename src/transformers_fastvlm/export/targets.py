# SPDX-License-Identifier: Apache-2.0
"""The table of export targets, and the interface between `export` and a target.

A target is a function `write(source, out, options)` in a module of this folder, which imports optional packages inside
functions. `source` must not be changed. `out` is an empty temporary directory. It is renamed after success and deleted
after an error, so `write` never cleans up. config.json is written last, unless other files hold its digest. `options`
are valid for the target's row below. `export` writes README.md from the `Report`, and copies the licence files.
"""

import importlib.util
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .export_source import Source

__all__ = ["TARGETS", "ExportOptions", "Report", "Target", "Writer", "how_to_run"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    Args:
        precisions: one of the target's precisions, or several if the target supports that.
        sizes: heights, equal to widths, of the images in pixels, each a multiple of 64; empty for the checkpoint's.
        external_data: for "onnx": store weights in separate files beside the graphs; None only if a graph needs it.
        say: called with a line of progress.
    """

    precisions: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    external_data: bool | None = None
    say: Callable[[str], None] = lambda text: None

    @property
    def precision(self) -> str:
        """The precision, for targets that take one."""
        (only,) = self.precisions
        return only


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a target.

    Args:
        checked_in: the runtime that ran the files, with its version, or None if they were not run.
        errors: relative errors by name (such as "float16: logits") against this package in PyTorch float32: the norm
            of the difference divided by the norm.
        how_to_run: Markdown, with a command or program to copy.
        limits: sentences about limits of the files or their runtime, and differences from this package.
        notes: sentences that the command prints.
        library_name: the runtime's name on the Hugging Face hub, for the card's header, or None.
    """

    checked_in: str | None
    errors: dict[str, float]
    how_to_run: str
    limits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    library_name: str | None = None


Writer = Callable[["Source", Path, ExportOptions], Report]


def how_to_run(name: str, **values: Any) -> str:
    """Return a text of the folder `how_to_run`, with `values` substituted for `$name`."""
    text = Path(__file__).with_name("how_to_run").joinpath(f"{name}.md").read_text(encoding="utf-8")
    return string.Template(text).substitute(values)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A row of the table.

    Args:
        summary: of the output, for help texts.
        module, function: in this folder.
        precisions: valid precisions, the default first; empty if the files keep the checkpoint's.
        several_precisions: whether one directory can hold several precisions.
        sizes: how many image sizes can be given.
        extra: the extra of this package that installs the target's packages.
        packages: import names of the packages in the extra.
        steps: the largest number of lines that the target says, for a progress bar.
    """

    summary: str
    module: str
    function: str = "write"
    precisions: tuple[str, ...] = ()
    several_precisions: bool = False
    sizes: Literal["none", "one", "many"] = "none"
    extra: str | None = None
    packages: tuple[str, ...] = ()
    steps: Callable[[ExportOptions], int] = lambda options: 2


def _onnx_steps(options: ExportOptions) -> int:
    """Two graphs for each dtype; three files and a check for each precision."""
    halves = sum(name in ("float16", "q4f16") for name in options.precisions)
    dtypes = (halves > 0) + (halves < len(options.precisions))
    return 2 * dtypes + 4 * len(options.precisions)


def _gguf_steps(options: ExportOptions) -> int:
    """A file for each precision and the encoder; each is checked if llama.cpp is installed, the encoder always."""
    checks = importlib.util.find_spec("llama_cpp") is not None
    return 2 + (1 + checks) * len(options.precisions)


def _coreml_steps(options: ExportOptions) -> int:
    """One conversion, and an evaluation for each size."""
    return 1 + max(1, len(options.sizes))


TARGETS: dict[str, Target] = {
    "onnx": Target(
        summary="ONNX for onnxruntime and transformers.js",
        module="onnx_export",
        precisions=("float32", "float16", "q8", "q4", "q4f16"),
        several_precisions=True,
        sizes="one",
        extra="onnx",
        packages=("onnx", "onnxruntime", "onnxscript"),
        steps=_onnx_steps,
    ),
    "gguf": Target(
        summary="the language model for llama.cpp, and the encoder for onnxruntime",
        module="gguf_export",
        precisions=("q8_0", "float32", "float16", "q4_0", "q4_k_m"),
        several_precisions=True,
        sizes="one",
        extra="gguf",
        packages=("gguf", "onnx", "onnxruntime", "onnxscript"),
        steps=_gguf_steps,
    ),
    "coreml": Target(
        summary="the encoder as fastvithd.mlpackage, for Core ML",
        module="coreml",
        precisions=("float32", "float16"),
        sizes="many",
        extra="coreml",
        packages=("coremltools",),
        steps=_coreml_steps,
    ),
    "mlx": Target(
        summary="a directory for mlx-vlm",
        module="mlx",
        precisions=("bfloat16", "float16", "float32", "q8", "q4"),
        extra="mlx",
        packages=("mlx", "mlx_vlm"),
    ),
    "apple-app": Target(
        summary="the layout of Apple's app: language model for MLX, encoder for Core ML",
        module="apple_app",
        precisions=("float16", "q8", "q4"),
        extra="apple-app",
        packages=("mlx", "coremltools"),
        steps=lambda options: 3,
    ),
    "executorch": Target(
        summary="programs for ExecuTorch's XNNPACK backend",
        module="executorch",
        precisions=("float32",),
        sizes="one",
        extra="executorch",
        packages=("executorch",),
        steps=lambda options: 4,
    ),
    "apple": Target(summary="Apple's layout, for Apple's scripts", module="layout_targets", function="write_apple"),
    "native": Target(
        summary="fast_vlm, which Transformers loads without this package",
        module="layout_targets",
        function="write_native",
        steps=lambda options: 3,
    ),
}
"""Every target by its name in `fastvlm export`."""
