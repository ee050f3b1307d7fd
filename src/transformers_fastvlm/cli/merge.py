# SPDX-License-Identifier: Apache-2.0
"""`fastvlm merge`: a LoRA adapter put into the weights of its base model."""

from typing import Annotated, Any

import typer

from . import options
from .cli_errors import notice, reports_errors
from .convert import LayoutName

__all__ = ["merge"]


@reports_errors
def merge(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            help="Directory of an adapter, of peft or with non_lora_trainables.bin of LLaVA code, or a hub repository.",
        ),
    ],
    out: options.OutDirectory,
    base: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub repository of the model that it was trained on, or tiny; default: what it names."
        ),
    ] = None,
    to: Annotated[
        LayoutName, typer.Option("--to", help="Layout of the result; see `fastvlm convert`.")
    ] = LayoutName.apple,
    dtype: Annotated[
        options.DtypeName, typer.Option(help="Type of the weights; auto is the base's.")
    ] = options.DtypeName.auto,
    debug: options.Debug = False,
) -> None:
    """Put a LoRA adapter into the weights of its base model.

    Neither is changed. The result is a whole model, which needs no peft. OUT appears under its name when it is
    complete.

    Example: fastvlm merge my-adapter my-model --base apple/FastVLM-0.5B
    """

    import torch

    from ..training import merge_adapter
    from .model_sources import RESEARCH_ONLY, licence_of

    weights: Any = None if dtype is options.DtypeName.auto else getattr(torch, dtype.value)
    done = merge_adapter(adapter, out, base=base, layout=to.value, dtype=weights)
    for note in done.notes:
        notice(f"note: {note}")
    if licence_of(str(done.directory)) == "apple-amlr" or (base or "").startswith("apple/"):
        notice(f"Apple's weights are {RESEARCH_ONLY}.")
    typer.echo(f"{done.directory}: {done.num_tensors} tensors, {done.num_bytes / 1e6:,.1f} MB, in {done.layout} layout")
