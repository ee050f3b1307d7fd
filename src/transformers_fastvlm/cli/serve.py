# SPDX-License-Identifier: Apache-2.0
"""`fastvlm serve`: OpenAI's chat completions, answered by a model on this machine."""

import contextlib
import enum
import ipaddress
import os
from typing import Annotated

import typer

from . import options
from .cli_errors import UserError, reports_errors, warn

__all__ = ["serve"]

_KEY = "FASTVLM_API_KEY"


class LogFormat(enum.StrEnum):
    """Formats of the log."""

    text = "text"
    json = "json"


def _key(given: str | None) -> str | None:
    """Return the key that clients must send; None if none was given. An empty key would let anyone in."""
    key = os.environ.get(_KEY) if given is None else given  # Typer treats an empty variable as unset
    if key is not None and not key.strip():
        raise UserError(f"--api-key or the variable {_KEY} is empty; give a key, or unset it to require none.")
    return key


@reports_errors
def serve(
    model: options.Model = options.DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces (set a key).")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free port.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="Model name for clients. Default: --model; for a directory, its last part."),
    ] = None,
    engine: options.Engine = options.EngineName.transformers,
    precision: options.Precision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DtypeName.auto,
    size: options.Size = None,
    do_exif_transpose: options.ExifTranspose = True,
    alpha_background: options.AlphaBackground = "white",
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=_KEY,
            show_default=False,
            help="Key that clients must send; the variable keeps it out of the process list. Default: none.",
        ),
    ] = None,
    allow_image_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Host to download images from, as name or name:port; repeatable. Addresses that are not public are "
            "always refused. Default: none, so images must come in the request.",
        ),
    ] = None,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, help="Maximum bytes of a request, and of the images downloaded for it.")
    ] = 2**25,
    max_images: Annotated[int, typer.Option(min=1, help="Maximum number of images in a request.")] = 8,
    max_pixels: Annotated[int, typer.Option(min=1, help="Maximum total pixels of a request's images.")] = (50_000_000),
    max_held_bytes: Annotated[
        int,
        typer.Option(min=1, help="Maximum bytes of bodies and of images, of all requests together."),
    ] = 2**30,
    max_held_images: Annotated[
        int, typer.Option(min=1, help="Maximum number of images, of all requests together.")
    ] = 64,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum tokens of a prompt, with its images. Default: the model's context."),
    ] = None,
    max_answer_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum tokens of an answer; also the default for requests without a limit.")
    ] = 1024,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Maximum number of requests answered together, and of answers to one (n).")
    ] = 8,
    queue: Annotated[
        int, typer.Option(min=0, help="Maximum number of waiting requests; further ones get status 429.")
    ] = 32,
    client_timeout: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds for a client to send its request, and to read each part of the answer."),
    ] = 60.0,
    fetch_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to download an image.")] = 10.0,
    log_format: Annotated[
        LogFormat, typer.Option(help="Lines on standard error, one per request: text, or JSON.")
    ] = LogFormat.text,
    open_metrics: Annotated[bool, typer.Option("--open-metrics", help="Answer GET /metrics without the key.")] = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Serve OpenAI's chat completions over HTTP, with images.

    The first Ctrl-C or SIGTERM finishes the running requests, the second stops at once. For many GPUs use vLLM.

    Examples:

        fastvlm serve -m tiny

        fastvlm serve -m apple/FastVLM-0.5B --port 8080 --max-images 2
    """
    from ..server import Settings, listen
    from ..server import serve as run
    from .asking import engine_settings, load

    settings = Settings(
        name=name or (os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model),
        api_key=_key(api_key),
        image_hosts=tuple(allow_image_host or ()),
        max_body_bytes=max_body_bytes,
        max_images=max_images,
        max_held_bytes=max_held_bytes,
        max_held_images=max_held_images,
        max_pixels=max_pixels,
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        batch_size=batch_size,
        queue=queue,
        client_timeout=client_timeout,
        fetch_timeout=fetch_timeout,
        open_metrics=open_metrics,
        do_exif_transpose=do_exif_transpose,
        alpha_background=alpha_background,
    )
    chosen = engine_settings(engine, precision, device, dtype, size)
    if engine == options.EngineName.vllm:
        chosen["max_images"] = max_images
    with listen(host, port) as bound, contextlib.closing(load(engine, model, chosen, batch_size)) as loaded:
        if settings.api_key is None and not ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback:
            warn(f"fastvlm: no key is set, so anyone who reaches this machine can use the model; set {_KEY}.")

        def ready(url: str) -> None:
            warn(f"fastvlm: {settings.name} ({loaded.device}, {loaded.dtype}) answers at {url}/v1; Ctrl-C stops it.")

        run(loaded, settings, bound, ready, log_format.value)
