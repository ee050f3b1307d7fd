# SPDX-License-Identifier: Apache-2.0
"""Fetching pictures by http(s) from hosts that were allowed, and from nowhere inside.

A name may lead anywhere, and somewhere else a second later. So the address that was checked is the one that is
connected to: the name is looked up once, and the connection made to the result. Redirects are not followed.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from .protocol import Picture
from .request_images import refused
from .settings import image_host

__all__ = ["Budget", "Fetcher", "is_public"]

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Beside what Python's module knows: Azure's service for virtual machines, relays of 6to4 (RFC 7526), Teredo, whose
# servers and clients can both be inside, documentation (RFC 9637), and segment routing (RFC 9602).
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in ("168.63.129.16/32", "192.88.99.0/24", "2001::/32", "3fff::/20", "5f00::/16")
]
_PIECE = 2**16
_MAX_ADDRESS = 2048


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet, also where it wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


class Budget:
    """Bytes that the pictures of one request may have together, spent by several threads.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size, self._left, self._lock = size, size, threading.Lock()

    def spend(self, count: int) -> bool:
        """Take bytes from it; return whether there were enough."""
        with self._lock:
            self._left -= count
            return self._left >= 0


class Fetcher:
    """Fetches pictures.

    Args:
        hosts: allowed ones, as "name" (ports 80 and 443) or "name:port"; see `image_host`.
        timeout: seconds for all of it.
        is_allowed: says of the IP address of a host whether it may be connected to.
    """

    def __init__(self, hosts: tuple[str, ...], timeout: float, is_allowed: Callable[[str], bool] = is_public) -> None:
        self.hosts = {image_host(host) for host in hosts}
        self.timeout, self.is_allowed = timeout, is_allowed

    def check(self, picture: Picture) -> None:
        """Raise ApiError unless the address is well formed and of an allowed host; nothing is looked up."""
        self._parts(picture)

    def fetch(self, picture: Picture, budget: Budget) -> bytes:
        """Return the bytes at a picture's address; blocks.

        Raises:
            ApiError: 400, the host is not allowed or not public, does not answer in time, answers something other
                than 200, or more bytes than are left of `budget`.
        """
        scheme, host, port, target = self._parts(picture)
        connection = _Connection(host, port, scheme == "https", self.timeout, self.is_allowed)
        # A time-out of a socket begins anew with each byte; this one is for all of them.
        alarm = threading.Timer(self.timeout, connection.give_up)
        alarm.daemon = True
        alarm.start()
        try:
            headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "transformers-fastvlm"}
            connection.request("GET", target, headers=headers)
            return self._read(picture, connection, budget)
        except _NotPublicError as error:
            message = f"{host} has an address that is not public; pictures are not fetched from there."
            raise refused(picture, message, "invalid_image_url") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = f"no answer within {self.timeout:g} seconds" if connection.gave_up else _reason(error)
            raise refused(
                picture, f"the picture could not be fetched from {host}: {why}.", "invalid_image_url"
            ) from error
        finally:
            alarm.cancel()
            connection.close()

    def _parts(self, picture: Picture) -> tuple[str, str, int, str]:
        """Return scheme, host, port, and path with query."""
        url = picture.url
        if len(url) > _MAX_ADDRESS or not url.isascii() or any(character <= " " for character in url):
            message = f"the address is longer than {_MAX_ADDRESS} characters or has others than printable ASCII."
            raise refused(picture, message, "invalid_image_url")
        try:
            parts = urllib.parse.urlsplit(url)
            scheme, host, port = parts.scheme.lower(), (parts.hostname or "").rstrip("."), parts.port
        except ValueError as error:
            raise refused(picture, f"the address is not valid: {error}.", "invalid_image_url") from error
        if not host or parts.username is not None or parts.password is not None:
            raise refused(picture, "the address has no host, or has a user's name in it.", "invalid_image_url")
        number = _PORTS[scheme] if port is None else port
        allowed = (host, number) in self.hosts or ((host, None) in self.hosts and number in _PORTS.values())
        if not allowed:
            raise refused(
                picture,
                f"pictures are not fetched from {host!r}, port {number}; send the picture as data:image/...;base64,... "
                "(who runs this server may allow hosts with --allow-image-host).",
                "image_host_not_allowed",
            )
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        return scheme, host, number, target

    def _read(self, picture: Picture, connection: "_Connection", budget: Budget) -> bytes:
        with connection.getresponse() as response:
            if response.status != 200:
                followed = " Redirects are not followed." if 300 <= response.status < 400 else ""
                raise refused(
                    picture,
                    f"the picture could not be fetched: the server answered {response.status}.{followed}",
                    "invalid_image_url",
                )
            content = bytearray()
            while piece := response.read(_PIECE):
                if not budget.spend(len(piece)):
                    message = f"the fetched pictures have more than {budget.size} bytes together."
                    raise refused(picture, message, "image_too_large")
                content += piece
            if connection.gave_up:  # a closed connection looks like the end of a body without a length
                raise TimeoutError
            if not content:
                raise refused(picture, "the picture is empty (0 bytes).")
            return bytes(content)


class _NotPublicError(OSError):
    """The address to connect to is not allowed."""


class _Connection(http.client.HTTPConnection):
    """A connection to the address that was checked."""

    def __init__(self, host: str, port: int, secure: bool, timeout: float, is_allowed: Callable[[str], bool]) -> None:
        super().__init__(host, port, timeout=timeout)
        self.default_port = _PORTS["https" if secure else "http"]  # is left out of the header Host
        self.secure, self.is_allowed, self.end, self.gave_up = secure, is_allowed, time.monotonic() + timeout, False
        # `sock` is None as soon as a response that ends the connection has begun, while its body is still read.
        self._in_use: Any = None

    def connect(self) -> None:
        """Look the host up once, check every address, and connect to the first that answers."""
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not all(self.is_allowed(address) for address in addresses):
            raise _NotPublicError
        self.sock: Any = None
        for address in addresses:
            with contextlib.suppress(OSError):
                self.sock = socket.create_connection((address, self.port), max(self.end - time.monotonic(), 0.01))
                break
        if self.sock is None:
            raise ConnectionError("no connection")
        self._in_use = self.sock
        if self.gave_up:
            raise TimeoutError
        if not self.is_allowed(self.sock.getpeername()[0]):
            raise _NotPublicError
        if self.secure:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self._in_use = self.sock
            self.sock.do_handshake()

    def give_up(self) -> None:
        """End the connection from another thread, whatever it is doing."""
        self.gave_up = True
        if self._in_use is not None:
            with contextlib.suppress(OSError):
                self._in_use.shutdown(socket.SHUT_RDWR)


def _reason(error: BaseException) -> str:
    """Return why a connection failed, without addresses of this machine's network."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted ({error.verify_message})"
    if isinstance(error, socket.gaierror):
        return "its name cannot be looked up"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return type(error).__name__
