# SPDX-License-Identifier: Apache-2.0
"""README.md of an export: where the weights come from, their licence, how exact the files are, how to run them."""

from .. import __version__
from ..checkpoints.licences import APPLES
from .export_source import RESEARCH_ONLY, Source
from .targets import Report, Target

__all__ = ["model_card"]


def model_card(source: Source, name: str, target: Target, precisions: tuple[str, ...], report: Report) -> str:
    """Return the card in Markdown, with the header that the Hugging Face hub reads."""
    origin = "the tiny model that comes with transformers-fastvlm" if source.is_tiny else f"`{source.name}`"
    parts = [
        _header(source, report),
        f"# {source.name}: {target.summary}",
        f"Written by transformers-fastvlm {__version__} (`fastvlm export {name}`) from {origin}.",
        "## Licence",
        _licence(source),
        "## How to run it",
        report.how_to_run.strip(),
        "## How exact it is",
        _exactness(precisions, report),
    ]
    if report.limits:
        parts += ["## What to know", "\n".join(f"- {limit}" for limit in report.limits)]
    return "\n\n".join(parts) + "\n"


def _header(source: Source, report: Report) -> str:
    licence = source.licence
    lines = ["---", "pipeline_tag: image-text-to-text", "tags:", "- fastvlm"]
    if report.library_name:
        lines.append(f"library_name: {report.library_name}")
    if licence == APPLES:
        lines += ["license: other", f"license_name: {APPLES}"]
    elif licence:
        lines.append(f"license: {licence}")
    if "/" in source.name:
        lines += [f"base_model: {source.name}"]
    return "\n".join([*lines, "---"])


def _licence(source: Source) -> str:
    if source.licence == APPLES:
        return RESEARCH_ONLY
    if source.licence is not None:
        return f"The weights are under {source.licence}, the licence of the original checkpoint."
    text = "The checkpoint states no licence; ask its author."
    return f"{text} {RESEARCH_ONLY}" if source.may_be_apples else text


def _exactness(precisions: tuple[str, ...], report: Report) -> str:
    lines = [f"Precision: {', '.join(precisions)}." if precisions else "The weights keep the checkpoint's precision."]
    if report.checked_in is None:
        lines.append("The files were not run: their runtime was not installed, or does not run on that machine.")
    else:
        lines.append(f"Checked in {report.checked_in}.")
    text = " ".join(lines)
    if not report.errors:
        return text
    header = "| | error |\n|---|---|"
    rows = "\n".join(f"| {name} | {error:.2e} |" for name, error in report.errors.items())
    return f"{text} Relative error (norm of the difference by the norm) against PyTorch float32:\n\n{header}\n{rows}"
