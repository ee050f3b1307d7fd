# SPDX-License-Identifier: Apache-2.0
"""`fastvlm eval-encoder`: evaluate FastViTHD by image classification, without a language model."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..storage.atomic_files import write_lines
from . import options
from .cli_errors import UserError, notice, reports_errors
from .model_sources import check_loadable, licence_notice, read_config
from .progress_bars import progress_bar
from .text_tables import print_table

__all__ = ["eval_encoder"]


@reports_errors
def eval_encoder(
    model: options.ModelArgument,
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of images: train/CLASS/… and val/CLASS/…, or CLASS/…, which is then split."),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="probe (logistic regression), knn, zero-shot, or several separated by commas. Default: probe,knn, "
            "and zero-shot if --text is given.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="For zero-shot: a safetensors file with text embeddings, one tensor per class."),
    ] = None,
    size: options.Size = None,
    do_exif_transpose: options.ExifTranspose = True,
    alpha_background: options.AlphaBackground = "white",
    max_pixels: options.MaxPixels = None,
    aspect: Annotated[
        str | None, typer.Option(help="pad, or square, which crops the centre. Default: the checkpoint's setting.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded together.")] = 16,
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="Neighbours for knn. Default: 20, or all if there are fewer.")
    ] = None,
    regularisation: Annotated[
        float | None,
        typer.Option(min=0.0, help="Regularisation of the probe. Default: chosen on a fifth of the training images."),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of each class for validation, if the folder has no train and val.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the split and the bootstrap.")] = 0,
    device: options.Device = "auto",
    dtype: Annotated[
        options.DtypeName, typer.Option(help="dtype of the encoder; auto: bfloat16 on CUDA, float32 elsewhere.")
    ] = options.DtypeName.auto,
    output: options.RecordFile = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Evaluate an encoder: classify images by its frozen features.

    Examples:

        fastvlm eval-encoder tiny images --method probe,knn

        fastvlm eval-encoder apple/FastVLM-0.5B images -o encoder.json
    """
    if aspect not in (None, "pad", "square"):
        raise UserError(f"--aspect is {aspect!r}; expected pad or square.")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output is {output}, but there is no directory {output.parent}. Create it first.")
    if method is None:
        methods: tuple[str, ...] = ("probe", "knn", "zero-shot") if text is not None else ("probe", "knn")
    else:
        methods = tuple(dict.fromkeys(word.strip() for word in method.split(",")))
    config = read_config(model)
    if config.get("model_type") != "fastvithd":
        check_loadable(model, config)

    import torch

    from ..engines.model_loading import find_device
    from ..evaluation.encoder import METHODS, judge_encoder

    unknown = [word for word in methods if word not in METHODS]
    if unknown:
        raise UserError(f"--method has {unknown[0]!r}; expected {', '.join(METHODS)}, separated by commas.")
    if ("zero-shot" in methods) != (text is not None):
        raise UserError("--method zero-shot and --text go together; give both or neither.")
    place = find_device(device, "--device")
    if dtype == options.DtypeName.auto:
        kind = torch.bfloat16 if place.type == "cuda" else torch.float32
    else:
        kind = getattr(torch, dtype)

    if message := licence_notice(model, config):
        notice(message)
    with progress_bar("encoding", "images") as show:
        record = judge_encoder(
            model,
            folder,
            methods=methods,
            text=text,
            size=size,
            aspect=aspect,
            batch_size=batch_size,
            k=k,
            regularisation=regularisation,
            held_out=held_out,
            seed=seed,
            device=place,
            dtype=kind,
            do_exif_transpose=do_exif_transpose,
            alpha_background=alpha_background,
            max_pixels=max_pixels,
            progress=show,
        )
    if output is not None:
        write_lines(output, [json.dumps(record, indent=2)])
        notice(f"wrote {output}")
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        _print(record)


def _print(record: dict[str, Any]) -> None:
    rows = [
        (
            method,
            f"{result['accuracy']:.1f}",
            f"{result['interval'][0]:.1f} to {result['interval'][1]:.1f}",
            f"{result['per_class']:.1f}",
            ", ".join(f"{key} {result[key]:g}" for key in ("regularisation", "k", "candidates") if key in result),
        )
        for method, result in record["results"].items()
    ]
    title = f"percent correct of {record['val']} images, {record['classes']} classes"
    print_table(
        title, ("method", "accuracy", f"{100 * record['confidence']:g} % interval", "mean of classes", ""), rows
    )
    typer.echo(
        f"{record['features']} features at {record['size']} px ({record['aspect']}), {record['dtype']}; "
        f"{record['train']} training images; encoded in {record['seconds']:.1f} s"
    )
