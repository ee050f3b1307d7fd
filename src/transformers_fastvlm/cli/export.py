# SPDX-License-Identifier: Apache-2.0
"""`fastvlm export`: convert a model to the format of another runtime."""

from pathlib import Path
from typing import Annotated

import typer

from ..export.targets import TARGETS
from . import options
from .cli_errors import notice, reports_errors, warn
from .progress_bars import progress_bar

__all__ = ["export"]

_TARGETS = "; ".join(f"{name}: {target.summary}" for name, target in TARGETS.items())
_PRECISIONS = "; ".join(
    f"{name}: {', '.join(target.precisions)}" for name, target in TARGETS.items() if target.precisions
)


def _comma_separated(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",")] if text else []


@reports_errors
def export(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=f"{_TARGETS}.")],
    model: options.ModelArgument,
    out: options.OutDirectory,
    precision: Annotated[
        str | None,
        typer.Option(
            help=f"{_PRECISIONS}. The first is the default. onnx and gguf take several, separated by commas, "
            "and write files for each."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Height and width of images in pixels, a multiple of 64, for targets that fix it. Several, separated "
            "by commas, if the target takes several. Default: the checkpoint's size."
        ),
    ] = None,
    external_data: Annotated[
        bool | None,
        typer.Option(
            "--external-data/--no-external-data",
            help="onnx: weights in separate files beside the graphs. Default: only for graphs above 1.5 GB.",
        ),
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Convert a model to the format of another runtime, and check it there.

    The checkpoint is never changed. OUT is created only when it is complete. Its README.md lists the accuracy of the
    files, how to run them, and the restrictions of their licence.

    Examples:

        fastvlm export onnx apple/FastVLM-0.5B fastvlm-onnx --precision q4f16

        fastvlm export onnx tiny tiny-onnx
    """
    from ..checkpoints.embedded import resolve_model
    from ..export import export as export_model
    from ..export.export_source import RESEARCH_ONLY, Source
    from .cli_errors import UserError
    from .model_sources import check_loadable, local_files, read_config

    sizes = []
    for word in _comma_separated(size):
        if not word.isdecimal():
            raise UserError(f"--size is {size!r}; expected a multiple of 64, or several separated by commas.")
        sizes.append(int(word))
    if target in TARGETS:
        check_loadable(model, read_config(model))
        directory = local_files(model)
    else:
        directory = Path(resolve_model(model))
    name = None if directory == Path(resolve_model(model)) else model
    with progress_bar("exporting", "steps") as show:
        done = export_model(
            target,
            directory,
            out,
            precision=_comma_separated(precision) or None,
            sizes=sizes,
            external_data=external_data,
            name=name,
            say=notice,
            progress=lambda done, total, doing: show(done, total),
        )
    for title, error in done.report.errors.items():
        notice(f"{title}: relative error {error:.2e} against PyTorch in float32")
    if done.report.checked_in is None:
        warn("the files were not checked: their runtime is not installed, or does not run on this machine")
    for note in done.report.notes:
        notice(f"note: {note}")
    if Source(directory, name).may_be_apples:
        notice(RESEARCH_ONLY)
    for file, size_in_bytes in done.files.items():
        notice(f"{size_in_bytes / 1e6:12,.1f} MB  {file}")
    typer.echo(
        f"{done.directory}: {done.num_bytes / 1e6:,.1f} MB for {target}, {', '.join(done.precisions) or 'as is'}"
    )
