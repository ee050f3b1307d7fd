# SPDX-License-Identifier: Apache-2.0
"""`fastvlm generate`: one answer to a question, with or without images."""

import contextlib
import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .cli_errors import FAILURE, INTERRUPTED, reports_errors
from .cli_images import question, read_images

if TYPE_CHECKING:
    from ..engines import Answer, Sampling

__all__ = ["generate"]


@reports_errors
def generate(
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            callback=options.utf8,
            help="The question. To place the images in it, write `<image>` once for each.",
        ),
    ],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE",
            help="Images: files, http(s) URLs, or - for standard input. Without images the prompt is text only.",
        ),
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    engine: options.Engine = options.EngineName.transformers,
    precision: options.Precision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DtypeName.auto,
    size: options.Size = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    num_beams: options.NumBeams = 1,
    seed: options.Seed = None,
    schema: options.SchemaFile = None,
    choices: options.Choices = None,
    regex: options.Regex = None,
    do_exif_transpose: options.ExifTranspose = True,
    alpha_background: options.AlphaBackground = "white",
    max_pixels: options.MaxPixels = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Answer one question about images.

    The answer is printed as it is generated. Greedy decoding is the default, so the answer is always the same. Set
    --temperature to sample.

    Examples:

        fastvlm generate street.jpg -p "What number is on the sign?"

        fastvlm generate a.jpg b.jpg -p "Compare the images." --json
    """
    from ..images.read_options import ReadOptions
    from .asking import answer, engine_settings, load, sampling_of, schema_of

    names = images or []
    sampling = sampling_of(max_new_tokens, temperature, top_p, seed, num_beams, schema_of(schema, choices, regex))
    settings = engine_settings(engine, precision, device, dtype, size)
    reading = ReadOptions(do_exif_transpose=do_exif_transpose, alpha_background=alpha_background, max_pixels=max_pixels)
    message = question(prompt, read_images(names, reading))
    conversation: list[dict[str, Any]] = [{"role": "user", "content": message}]
    if system is not None:
        conversation.insert(0, {"role": "system", "content": system})
    start = time.perf_counter()
    loaded = load(engine, model, settings)
    load_seconds = time.perf_counter() - start
    with contextlib.closing(loaded):
        if not as_json:
            answered = answer(loaded, conversation, sampling, say=lambda text: typer.echo(text, nl=False))
            typer.echo()
            _end(answered, sampling)
            return
        answered = answer(loaded, conversation, sampling)
        about = {"device": loaded.device, "dtype": loaded.dtype, "size": loaded.size}
    seconds = answered.seconds
    result = {
        "model": model,
        "images": names,
        "system": system,
        "prompt": prompt,
        "answer": answered.text,
        "finish_reason": answered.finish_reason,
        "tokens": {
            "prompt": answered.prompt_tokens,
            "image": answered.image_tokens,
            "answer": answered.completion_tokens,
        },
        "seconds": {
            name: None if value is None else round(value, 4)
            for name, value in {
                "load": load_seconds,
                "preprocess": seconds.prepare,
                "first_token": seconds.first_token,
                "generate": seconds.generate,
            }.items()
        },
        "engine": engine.value,
        **about,
        "sampling": {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "num_beams": num_beams,
            "seed": seed,
            "schema": None if sampling.schema is None else {sampling.schema.kind: sampling.schema.value},
        },
    }
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
    _end(answered, sampling)


def _end(answered: "Answer", sampling: "Sampling") -> None:
    """Report an incomplete answer, by exit code for scripts."""
    from .asking import remark

    remark(answered, sampling)
    if answered.finish_reason == "cancelled":
        raise typer.Exit(INTERRUPTED)
    if answered.finish_reason == "length" and sampling.schema is not None:
        raise typer.Exit(FAILURE)
