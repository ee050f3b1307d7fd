# SPDX-License-Identifier: Apache-2.0
"""`fastvlm convert`: write a checkpoint in another layout."""

import enum
from typing import Annotated

import typer

from . import options
from .cli_errors import notice, reports_errors
from .progress_bars import progress_bar

__all__ = ["convert"]


class LayoutName(enum.StrEnum):
    """Values of --to."""

    apple = "apple"
    transformers = "transformers"
    native = "native"


@reports_errors
def convert(
    source: options.Source,
    out: options.OutDirectory,
    to: Annotated[
        LayoutName,
        typer.Option(
            "--to",
            help="apple: Apple's flat config.json and tensor names. transformers: this package's nested config.json. "
            "native: fast_vlm, which Transformers loads without this package (it needs timm).",
        ),
    ],
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a checkpoint in another layout.

    The layout of SOURCE is detected, and its files are never changed. Every tensor keeps its exact values. OUT is
    created only when it is complete.

    Examples:

        fastvlm convert apple/FastVLM-0.5B fastvlm-native --to native

        fastvlm convert fastvlm-native fastvlm-apple --to apple
    """
    from ..checkpoints import convert as convert_checkpoint
    from .model_sources import RESEARCH_ONLY, licence_of, local_files

    directory = local_files(source)
    with progress_bar("converting", "bytes") as show:
        done = convert_checkpoint(directory, out, to.value, progress=lambda done, total, name: show(done, total))
    for name in done.dropped:
        notice(f"left out on purpose: {name}")
    for name in done.not_copied:
        notice(f"not copied: {name}")
    for note in done.notes:
        notice(f"note: {note}")
    if licence_of(source) == "apple-amlr":
        notice(f"Apple's weights are {RESEARCH_ONLY}.")
    size = f"{done.num_tensors} tensors, {done.num_bytes / 1e6:,.1f} MB"
    typer.echo(f"{done.directory}: {size}, from {done.source_layout} to {done.layout}")
