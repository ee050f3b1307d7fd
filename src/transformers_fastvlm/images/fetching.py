# SPDX-License-Identifier: Apache-2.0
"""Downloading images and videos by http(s), with one limit of time and one of size for the whole download.

The time limit also covers a host that sends a byte now and then or none, a slow name server, an endless body and
redirects. Redirects lead to http(s) only.
"""

import base64
import contextlib
import http.client
import queue
import socket
import ssl
import string
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Budget", "FetchError", "TooManyBytesError", "UrlParts", "download", "fetch", "parse_url"]

DOWNLOAD_SECONDS = 60.0
"""Time limit of a download: name look-up, redirects and body."""
MAX_DOWNLOAD_BYTES = 2**28

_PORTS = {"http": 80, "https": 443}
_REDIRECTIONS = (301, 302, 303, 307, 308)
_PIECE = 2**16
_REDIRECTS = 5
_HEADERS = {"Accept": "image/*,*/*;q=0.5", "User-Agent": "transformers-fastvlm"}


class FetchError(ConnectionError):
    """The download failed; the message is the reason only, without a full stop."""


class TooManyBytesError(ValueError):
    """The download is larger than allowed."""


class Budget:
    """Bytes that several downloads may use together. Thread-safe.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size, self._left, self._lock = size, size, threading.Lock()

    def spend(self, count: int) -> None:
        """Subtract bytes from the budget.

        Raises:
            TooManyBytesError: fewer bytes are left.
        """
        with self._lock:
            self._left -= count
            if self._left < 0:
                raise TooManyBytesError(f"more than {self.size} bytes")


class UrlParts(NamedTuple):
    """The parts of an http(s) URL; `target` is its path with the query, in ASCII."""

    scheme: str
    host: str
    port: int
    target: str


def parse_url(url: str) -> UrlParts:
    """Return the parts of a URL, without resolving the host.

    Raises:
        ValueError: the URL is not http(s), or not well formed; the message is the reason only.
    """
    parts = urllib.parse.urlsplit(url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
    if scheme not in _PORTS:
        raise ValueError(f"{scheme[:20]!r} is not http or https")
    if not host or parts.username is not None or parts.password is not None:
        raise ValueError("the URL has no host, or contains a user name")
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    port = _PORTS[scheme] if parts.port is None else parts.port
    return UrlParts(scheme, host, port, urllib.parse.quote(path, safe=string.punctuation))


def download(url: str, kind: str) -> bytes:
    """Return the bytes at a URL that the program's user gave: any host, within the limits above.

    Args:
        kind: what it is, for the error: "image" or "video".

    Raises:
        ConnectionError: it cannot be downloaded.
        ValueError: it is empty or too large.
    """
    try:
        content = fetch(url, DOWNLOAD_SECONDS, Budget(MAX_DOWNLOAD_BYTES), redirects=_REDIRECTS)
    except FetchError as error:
        raise ConnectionError(
            f"could not download the {kind} {url}: {error}. Check the URL and the network, or pass a local file."
        ) from error
    except TooManyBytesError as error:
        raise ValueError(
            f"the {kind} at {url} is larger than {MAX_DOWNLOAD_BYTES} bytes; download it yourself first."
        ) from error
    if not content:
        raise ValueError(f"the download of {url} is empty (0 bytes).")
    return content


def fetch(
    url: str, seconds: float, budget: Budget, is_allowed: Callable[[str], bool] | None = None, redirects: int = 0
) -> bytes:
    """Return the bytes at a URL; blocks.

    Args:
        url: an http(s) URL.
        seconds: limit for the whole download: name look-up, connections, redirects and body.
        budget: limit of bytes.
        is_allowed: returns whether an IP address may be connected to. The connection goes to the checked address
            itself, even if the name server changes its answer, so no proxy is used. None allows any address and uses
            the proxies of the environment.
        redirects: maximum number of redirects to follow, to http(s) only.

    Raises:
        FetchError: not an http(s) URL, not allowed, no answer in time, or an error or incomplete answer.
        TooManyBytesError: more bytes than are left of `budget`.
    """
    watchdog = _Watchdog(seconds)
    try:
        for _ in range(redirects + 1):
            connection, target, headers = _connection(parse_url(url), watchdog, is_allowed)
            with contextlib.closing(connection):
                connection.request("GET", target, headers=_HEADERS | headers)
                with connection.getresponse() as response:
                    location = response.headers["Location"] if response.status in _REDIRECTIONS else None
                    if location is None or not redirects:
                        return _body(response, budget, watchdog)
            # http.client decodes headers as Latin-1, whatever their encoding.
            url = urllib.parse.urljoin(url, urllib.parse.quote(location.encode("latin-1"), safe=string.punctuation))
        raise FetchError(f"more than {redirects} redirects")
    except (TooManyBytesError, FetchError):
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = watchdog.is_over or isinstance(error, TimeoutError)
        raise FetchError(f"no answer within {seconds:g} seconds" if late else _reason(error)) from error
    finally:
        watchdog.stop()


def _body(response: http.client.HTTPResponse, budget: Budget, watchdog: "_Watchdog") -> bytes:
    if response.status != 200:
        followed = ", and redirects are not followed" if response.status in _REDIRECTIONS else ""
        raise FetchError(f"the server answered {response.status}{followed}")
    content = bytearray()
    while piece := response.read(_PIECE):
        budget.spend(len(piece))
        content += piece
    watchdog.check()  # a connection that the watchdog closed looks like the end of a body
    if response.length:
        raise FetchError(f"the connection ended {response.length} bytes before the end")
    return bytes(content)


class _Watchdog:
    """Closes a thread's connection when the time is over, since a socket's timeout restarts with each byte.

    Attributes:
        is_over: whether the time is over.
    """

    def __init__(self, seconds: float) -> None:
        self._end, self.is_over = time.monotonic() + seconds, False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._bite)
        self._timer.daemon = True
        self._timer.start()

    def left(self) -> float:
        """Return the seconds that are left, always above 0."""
        return max(self._end - time.monotonic(), 0.01)

    def check(self) -> None:
        """Raise TimeoutError if the time is over."""
        if self.is_over:
            raise TimeoutError

    def watch(self, one: socket.socket) -> None:
        """Set the connection to close when the time is over."""
        self._socket = one
        self.check()

    def stop(self) -> None:
        self._timer.cancel()
        self._timer.join()

    def _bite(self) -> None:
        self.is_over = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class _Connection(http.client.HTTPConnection):
    """A connection to a checked address.

    Args:
        host, port: of the server, or of a proxy.
        secure: for https the server's name, also at the end of a tunnel; None for http.
        watchdog: limits its time.
        is_allowed: see `fetch`.
    """

    def __init__(
        self, host: str, port: int, secure: str | None, watchdog: _Watchdog, is_allowed: Callable[[str], bool] | None
    ) -> None:
        super().__init__(host, port)
        self.default_port = _PORTS["https" if secure else "http"]  # omitted from the header Host
        self._secure, self._watchdog, self._is_allowed = secure, watchdog, is_allowed or (lambda address: True)

    def connect(self) -> None:
        """Resolve the host once, check every address, and connect to the first that answers."""
        addresses = _look_up(self.host, self.port, self._watchdog.left())
        if not all(self._is_allowed(address) for address in addresses):
            raise FetchError("it has an address that is not public")
        self.sock: Any = self._first(addresses)
        self._watchdog.watch(self.sock)
        if not self._is_allowed(self.sock.getpeername()[0]):
            raise FetchError("it has an address that is not public")
        if getattr(self, "_tunnel_host", None):
            self._tunnel()  # type: ignore[attr-defined]  # of set_tunnel(), as in the class's own connect()
        if self._secure:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self._secure, do_handshake_on_connect=False)
            self._watchdog.watch(self.sock)
            self.sock.do_handshake()

    def _first(self, addresses: list[str]) -> socket.socket:
        failure: OSError = ConnectionError("no address")
        for address in addresses:
            self._watchdog.check()
            try:
                return socket.create_connection((address, self.port), self._watchdog.left())
            except OSError as error:
                failure = error
        raise failure


def _connection(
    url: UrlParts, watchdog: _Watchdog, is_allowed: Callable[[str], bool] | None
) -> tuple[_Connection, str, dict[str, str]]:
    """Return an unopened connection for a URL, and the target and headers of a request on it."""
    scheme, host, port, target = url
    secure = host if scheme == "https" else None
    proxy = urllib.request.getproxies().get(scheme) if is_allowed is None else None
    if not proxy or urllib.request.proxy_bypass(f"{host}:{port}"):
        return _Connection(host, port, secure, watchdog, is_allowed), target, {}
    parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    if parts.scheme not in _PORTS or not parts.hostname:
        raise FetchError(f"the environment's proxy for {scheme} is not an http proxy")
    headers = {}
    if parts.username is not None:
        user = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    connection = _Connection(parts.hostname, parts.port or _PORTS["http"], secure, watchdog, None)
    if secure is None:
        name = f"[{host}]" if ":" in host else host
        return connection, f"http://{name}:{port}{target}", headers
    connection.set_tunnel(host, port, headers)
    return connection, target, {}


def _look_up(host: str, port: int, seconds: float) -> list[str]:
    """Return the IP addresses of a host; in a thread, since `getaddrinfo` has no timeout and can take minutes."""
    found: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.put(list(dict.fromkeys(str(entry[4][0]) for entry in entries)))
        except Exception as error:
            found.put(error)

    threading.Thread(target=look_up, name="look-up", daemon=True).start()
    try:
        answer = found.get(timeout=seconds)
    except queue.Empty as error:
        raise TimeoutError from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _reason(error: BaseException) -> str:
    """Return why a connection failed, without addresses of the local network."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted ({error.verify_message})"
    if isinstance(error, socket.gaierror):
        return "its name cannot be looked up"
    if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
        return f"its answer is not HTTP ({type(error).__name__})"
    return getattr(error, "strerror", None) or str(error)[:200] or type(error).__name__
