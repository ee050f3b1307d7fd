# SPDX-License-Identifier: Apache-2.0
"""`fastvlm merge`: merge a LoRA adapter into the weights of its base model."""

from typing import Annotated, Any

import typer

from . import options
from .cli_errors import notice, reports_errors
from .convert import LayoutName
from .progress_bars import progress_bar

__all__ = ["merge"]


@reports_errors
def merge(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            help="Directory or hub repository of an adapter: of peft, or of LLaVA with non_lora_trainables.bin.",
        ),
    ],
    out: options.OutDirectory,
    base: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub repository of the base model, or tiny. Default: the model that the adapter names."
        ),
    ] = None,
    to: Annotated[
        LayoutName, typer.Option("--to", help="Checkpoint layout of OUT; see `fastvlm convert`.")
    ] = LayoutName.apple,
    dtype: Annotated[
        options.DtypeName, typer.Option(help="dtype of the weights; auto: as in the base model.")
    ] = options.DtypeName.auto,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Merge a LoRA adapter into the weights of its base model.

    The adapter and the base model are not changed. The result is a complete model, which does not need peft. OUT is
    created only when it is complete.

    Examples:

        fastvlm merge my-adapter my-model

        fastvlm merge my-adapter my-model --base apple/FastVLM-0.5B --to native
    """

    import torch

    from ..training import merge_adapter
    from .model_sources import RESEARCH_ONLY, licence_of

    weights: Any = None if dtype is options.DtypeName.auto else getattr(torch, dtype.value)
    with progress_bar("merging", "bytes") as show:
        done = merge_adapter(
            adapter,
            out,
            base=base,
            layout=to.value,
            dtype=weights,
            progress=lambda done, total, name: show(done, total),
        )
    for note in done.notes:
        notice(f"note: {note}")
    if licence_of(str(done.directory)) == "apple-amlr" or (base or "").startswith("apple/"):
        notice(f"Apple's weights are {RESEARCH_ONLY}.")
    typer.echo(f"{done.directory}: {done.num_tensors} tensors, {done.num_bytes / 1e6:,.1f} MB, in {done.layout} layout")
