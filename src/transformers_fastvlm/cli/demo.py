# SPDX-License-Identifier: Apache-2.0
"""`fastvlm demo`: a web page to ask about pictures."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Annotated

import typer

from . import options
from .cli_errors import UserError, notice, reports_errors

__all__ = ["demo"]


@reports_errors
def demo(
    model: options.Model = options.DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets everyone in who reaches this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    engine: options.Engine = options.EngineName.transformers,
    precision: options.Precision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DtypeName.auto,
    size: options.Size = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    debug: options.Debug = False,
) -> None:
    """Show a web page: ask about pictures, and caption what the camera sees.

    The page and all that it needs come from this machine; nothing is sent anywhere else. It has no password. Ctrl-C
    ends it.

    Example: fastvlm demo --model tiny
    """
    from ..checkpoints.embedded import resolve_model, tiny_checkpoint
    from ..demo import Page, check_gradio
    from .asking import engine_settings, load
    from .model_sources import licence_notice, read_config

    check_gradio()
    settings = engine_settings(engine, precision, device, dtype, size)
    # One at a time, so that each visitor's conversation is reused; vLLM keeps them by itself.
    loaded = load(engine, model, settings, 1 if engine == options.EngineName.transformers else None)
    scenes = resolve_model(model) == str(tiny_checkpoint())
    page = Page(
        loaded,
        name="the tiny model of the package, for drawn scenes" if scenes else model,
        notice=licence_notice(model, read_config(model)),
        scenes=scenes,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    with contextlib.closing(loaded), page, _until_asked_to_end() as ended:
        try:
            address = page.start(host, port)
        except OSError as error:
            raise UserError(f"the page cannot listen on {host}, port {port or 'any from 7860 on'}: {error}") from error
        notice(f"The page is at {address} (Ctrl-C ends it).")
        ended.wait()


@contextlib.contextmanager
def _until_asked_to_end() -> Iterator[threading.Event]:
    """Set an event at Ctrl-C and SIGTERM, so that the page is closed and its uploads are removed."""
    ended = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: ended.set()) for number in signals]
    try:
        yield ended
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
