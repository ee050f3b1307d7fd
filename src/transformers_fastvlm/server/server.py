# SPDX-License-Identifier: Apache-2.0
"""Listen, and shut down: the first signal finishes all accepted requests, the second stops at once."""

import asyncio
import contextlib
import functools
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal

from PIL import Image

from ..engines import Engine
from .application import Service, create_app
from .request_log import JsonLines
from .settings import Settings

__all__ = ["listen", "serve", "server_of"]

_LAST_BYTES_SECONDS = 5.0
_CONNECTIONS = 200
_BACKLOG = 128
_TICKS_BETWEEN_LOOKS = 2  # a tick is a tenth of a second
_LOGGERS = ("transformers_fastvlm.server", "uvicorn.error")


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket, so that a port in use is reported before a model is loaded.

    Args:
        host: name or address of this machine.
        port: port; 0 for any free port.

    Raises:
        ImportError: FastAPI, uvicorn or prometheus-client is not installed.
        OSError: this machine does not have the address, or the port is in use.
    """
    _check_installed()
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise OSError(f"--host is {host!r}, not a name or address of this machine: {error.strerror}.") from error
    family, kind, _, _, address = found[0]
    bound = socket.socket(family, kind)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror}. Choose another --port or --host."
        ) from error
    return bound


def serve(
    engine: Engine,
    settings: Settings,
    bound: socket.socket,
    ready: Callable[[str], None],
    log_format: Literal["text", "json"] = "text",
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; a second signal ends the process immediately.

    The first signal finishes all accepted requests. While the server runs, the process logs requests, and Pillow's
    limit of pixels is `settings.max_pixels`, because images from clients are untrusted.

    Args:
        engine: the model; the caller closes it.
        settings: limits and names.
        bound: see `listen`.
        ready: called with the URL when the server accepts requests.
        log_format: of the lines on standard error.

    Raises:
        ImportError: FastAPI, uvicorn or prometheus-client is not installed.
    """
    server = server_of(Service(engine, settings), bound, ready)
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, settings.max_pixels
    try:
        with _logging(log_format), warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            server.run(sockets=[bound])
    finally:
        Image.MAX_IMAGE_PIXELS = before


def server_of(service: Service, bound: socket.socket, ready: Callable[[str], None]) -> Any:
    """Return a `uvicorn.Server` for a service; its `run(sockets=[bound])` ends when the service drained."""
    _check_installed()
    import uvicorn

    from .transport import Connection, close_overdue, on_loop_error

    class Server(uvicorn.Server):
        """Keeps listening while it finishes its requests, so that new clients get an error."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().set_exception_handler(on_loop_error(self.server_state.connections))
            await super().startup(sockets)
            if self.started:
                host, port = bound.getsockname()[:2]
                ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

        def handle_exit(self, sig: int, frame: Any) -> None:
            if service.draining:
                os._exit(128 + sig)
            service.draining = True

        async def on_tick(self, counter: int) -> bool:
            await super().on_tick(counter)
            if counter % _TICKS_BETWEEN_LOOKS == 0:
                now = asyncio.get_running_loop().time()
                close_overdue(self.server_state.connections, now, service.settings.client_timeout)
            return service.draining and service.active == 0

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            leftovers = asyncio.ensure_future(self.close_leftovers())
            await super().shutdown(sockets)
            leftovers.cancel()

        async def close_leftovers(self) -> None:
            # All answers are in buffers. Do not wait for clients that have stopped reading.
            await asyncio.sleep(_LAST_BYTES_SECONDS)
            for connection in list(self.server_state.connections):
                connection.transport.abort()

        def abort(self, scope: Any) -> None:
            for connection in list(self.server_state.connections):
                if connection.client == scope["client"]:
                    connection.transport.abort()

    config = uvicorn.Config(
        create_app(service),
        http=functools.partial(Connection, most=max(_CONNECTIONS, 3 * service.settings.max_requests)),
        loop="asyncio",
        backlog=_BACKLOG,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )
    server = Server(config)
    service.abort = server.abort
    return server


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'fastvlm serve needs FastAPI, uvicorn and prometheus-client: pip install "transformers-fastvlm[serving]".'
        ) from error


@contextlib.contextmanager
def _logging(log_format: str) -> Any:
    """Write the request log and uvicorn's warnings to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    handler.setFormatter(JsonLines() if log_format == "json" else text)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(one, one.level, one.propagate) for one in loggers]
    for one, level in zip(loggers, (logging.INFO, logging.WARNING), strict=True):
        one.addHandler(handler)
        one.setLevel(level)
        one.propagate = False
    try:
        yield
    finally:
        for one, level, propagate in before:
            one.removeHandler(handler)
            one.setLevel(level)
            one.propagate = propagate
