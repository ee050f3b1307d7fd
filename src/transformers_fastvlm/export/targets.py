# SPDX-License-Identifier: Apache-2.0
"""The table of export targets, and what the frame and a target say to each other.

A target is a function `write(source, out, options)` in a module of this folder, which imports its packages in its
functions. `source` is only read. `out` is an empty directory that gets its name when everything is written and goes on
any error, so `write` never cleans up; what makes it look like a model (config.json) is written last. `options` fit the
target's row below. From the `Report` the frame writes README.md; it also copies the licence files.
"""

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
    """What the user asked for.

    Args:
        precisions: one of the target's precisions, or several where it takes several.
        sizes: heights, equal to widths, of the pictures in pixels, each a multiple of 64; empty for the checkpoint's.
        external_data: for "onnx": weights in files of their own beside the graphs; None where a graph needs it.
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
    """What a target wrote.

    Args:
        checked_in: the runtime that the files were run in, with its version, or None where it cannot run here.
        errors: what was measured: name (such as "float16: logits") to the relative error against this package in
            PyTorch float32: the norm of the difference divided by the norm.
        how_to_run: Markdown, with a command or program that can be copied.
        limits: sentences about what the files or their runtime cannot do, or do otherwise than this package.
        notes: sentences that the user should read now; the command prints them.
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
    """Return a text of the folder `how_to_run`, with values in place of `$name`."""
    text = Path(__file__).with_name("how_to_run").joinpath(f"{name}.md").read_text(encoding="utf-8")
    return string.Template(text).substitute(values)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A row of the table.

    Args:
        summary: what it writes, for help texts.
        module, function: in this folder.
        precisions: the valid ones, the default first; empty where the files keep the checkpoint's.
        several_precisions: whether one directory can hold several of them.
        sizes: how many sizes of pictures a user may name.
        extra: of this package, that installs what the target needs.
        packages: names to import that come with the extra.
    """

    summary: str
    module: str
    function: str = "write"
    precisions: tuple[str, ...] = ()
    several_precisions: bool = False
    sizes: Literal["none", "one", "many"] = "none"
    extra: str | None = None
    packages: tuple[str, ...] = ()


TARGETS: dict[str, Target] = {
    "onnx": Target(
        summary="ONNX for onnxruntime and transformers.js",
        module="onnx_export",
        precisions=("float32", "float16", "q8", "q4", "q4f16"),
        several_precisions=True,
        sizes="one",
        extra="onnx",
        packages=("onnx", "onnxruntime", "onnxscript"),
    ),
    "coreml": Target(
        summary="the encoder as fastvithd.mlpackage, for Core ML",
        module="coreml",
        precisions=("float32", "float16"),
        sizes="many",
        extra="coreml",
        packages=("coremltools",),
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
    ),
    "executorch": Target(
        summary="programs for ExecuTorch's XNNPACK backend",
        module="executorch",
        precisions=("float32",),
        sizes="one",
        extra="executorch",
        packages=("executorch",),
    ),
    "apple": Target(summary="Apple's layout, for Apple's scripts", module="layout_targets", function="write_apple"),
    "native": Target(
        summary="fast_vlm, which Transformers loads without this package",
        module="layout_targets",
        function="write_native",
    ),
}
"""Every target by its name in `fastvlm export`."""
