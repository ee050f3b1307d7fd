# SPDX-License-Identifier: Apache-2.0
"""Download images by http(s) from allowed, public hosts only. Redirects are not followed."""

import ipaddress
from collections.abc import Callable

from ..images.fetching import Budget, FetchError, TooManyBytesError, UrlParts, fetch, parse_url
from .protocol import ImageUrl
from .request_images import refused
from .settings import image_host

__all__ = ["Fetcher", "is_public"]

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Beside what Python's module knows: Azure's service for virtual machines, relays of 6to4 (RFC 7526), Teredo, whose
# servers and clients can both be inside, documentation (RFC 9637), and segment routing (RFC 9602).
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in ("168.63.129.16/32", "192.88.99.0/24", "2001::/32", "3fff::/20", "5f00::/16")
]
_MAX_LENGTH = 2048


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


class Fetcher:
    """Downloads images.

    Args:
        hosts: allowed hosts, as "name" (ports 80 and 443) or "name:port"; see `image_host`.
        timeout: seconds for the whole download.
        is_allowed: whether connections to an IP address are allowed.
    """

    def __init__(self, hosts: tuple[str, ...], timeout: float, is_allowed: Callable[[str], bool] = is_public) -> None:
        self.hosts = {image_host(host) for host in hosts}
        self.timeout, self.is_allowed = timeout, is_allowed

    def check(self, image_url: ImageUrl) -> None:
        """Raise ApiError unless the URL is well formed and its host is allowed; without a DNS lookup."""
        self._checked(image_url)

    def fetch(self, image_url: ImageUrl, budget: Budget) -> bytes:
        """Return the bytes at an image's URL; blocks.

        Raises:
            ApiError: 400, the host is not allowed, is not public, does not answer in time, answers with a status other
                than 200, or sends more bytes than are left of `budget`.
        """
        host = self._checked(image_url).host
        try:
            content = fetch(image_url.url, self.timeout, budget, self.is_allowed)
        except TooManyBytesError as error:
            message = f"the downloaded images have more than {budget.size} bytes together."
            raise refused(image_url, message, "image_too_large") from error
        except FetchError as error:
            message = f"the image could not be downloaded from {host}: {error}."
            raise refused(image_url, message, "invalid_image_url") from error
        if not content:
            raise refused(image_url, "the image is empty (0 bytes).")
        return content

    def _checked(self, image_url: ImageUrl) -> UrlParts:
        url = image_url.url
        if len(url) > _MAX_LENGTH or not url.isascii() or any(character <= " " for character in url):
            message = f"the URL is longer than {_MAX_LENGTH} characters or is not printable ASCII."
            raise refused(image_url, message, "invalid_image_url")
        try:
            parts = parse_url(url)
        except ValueError as error:
            raise refused(image_url, f"the URL is not valid: {error}.", "invalid_image_url") from error
        host, port = parts.host, parts.port
        if not ((host, port) in self.hosts or ((host, None) in self.hosts and port in (80, 443))):
            raise refused(
                image_url,
                f"images are not downloaded from {host!r}, port {port}; send the image as data:image/...;base64,... "
                "(the server's operator can allow hosts with --allow-image-host).",
                "image_host_not_allowed",
            )
        return parts
