# SPDX-License-Identifier: Apache-2.0
"""`fastvlm demo`: a web page to ask about images."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Annotated

import typer

from . import options
from .cli_errors import UserError, reports_errors, warn

__all__ = ["demo"]


@reports_errors
def demo(
    model: options.Model = options.DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on. Default: the first free port from 7860.")
    ] = None,
    engine: options.Engine = options.EngineName.transformers,
    precision: options.Precision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DtypeName.auto,
    size: options.Size = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Serve a web page to ask about images and to caption a camera.

    This machine serves all files of the page and sends no data elsewhere. The page has no password. Ctrl-C stops it.

    Examples:

        fastvlm demo --model tiny

        fastvlm demo --model apple/FastVLM-0.5B --port 8080
    """
    from ..checkpoints.embedded import resolve_model, tiny_checkpoint
    from ..demo import Page, check_gradio
    from .asking import engine_settings, load
    from .model_sources import licence_notice, read_config

    check_gradio()
    settings = engine_settings(engine, precision, device, dtype, size)
    # One request at a time, so that each visitor's cache is reused; vLLM has its own prefix cache.
    loaded = load(engine, model, settings, 1 if engine == options.EngineName.transformers else None)
    scenes = resolve_model(model) == str(tiny_checkpoint())
    page = Page(
        loaded,
        name="tiny, the test model that ships with the package, for drawn scenes" if scenes else model,
        notice=licence_notice(model, read_config(model)),
        scenes=scenes,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    with contextlib.closing(loaded), page, _until_asked_to_end() as ended:
        try:
            url = page.start(host, port)
        except OSError as error:
            raise UserError(f"the page cannot listen on {host}, port {port or 'any from 7860'}: {error}") from error
        warn(f"The page is at {url} (Ctrl-C stops it).")
        ended.wait()


@contextlib.contextmanager
def _until_asked_to_end() -> Iterator[threading.Event]:
    """Set an event at Ctrl-C or SIGTERM, so that the page is closed and its uploads are removed."""
    ended = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: ended.set()) for number in signals]
    try:
        yield ended
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
