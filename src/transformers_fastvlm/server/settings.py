# SPDX-License-Identifier: Apache-2.0
"""Settings of the server's operator; clients cannot change them."""

import ipaddress
import re
from dataclasses import dataclass

from ..images.read_options import ReadOptions

__all__ = ["Settings", "image_host"]

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


def image_host(text: str) -> tuple[str, int | None]:
    """Return the name, and the port or None, of a host such as "name", "name:port", "::1" or "[::1]:port".

    Raises:
        ValueError: it is not a host.
    """
    name, port = text.strip().lower(), ""
    if name.startswith("["):
        name, closed, port = name[1:].partition("]")
        is_good = bool(closed) and _is_ipv6(name) and (not port or port.startswith(":"))
        port, has_port = port[1:], bool(port)
    elif _is_ipv6(name):
        is_good, has_port = True, False
    else:
        name, colon, port = name.partition(":")
        name, has_port = name.rstrip("."), bool(colon)
        is_good = bool(_NAME.fullmatch(name))
    if has_port:
        is_good = is_good and port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535
    if not is_good:
        raise ValueError(
            f"an image host is {text[:80]!r}; expected a name such as images.example.com, or name:port, in ASCII."
        )
    return name, int(port) if has_port else None


def _is_ipv6(name: str) -> bool:
    try:
        ipaddress.IPv6Address(name)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Settings(ReadOptions):
    """Limits and names of a server, and how images are read; see `ReadOptions`.

    Args:
        name: name of the model for clients.
        api_key: key that clients must send as `Authorization: Bearer KEY`, without surrounding white space, or None.
        image_hosts: hosts, as "name" or "name:port", from which images may be fetched.
        max_body_bytes: maximum bytes of a request's body, and of all images downloaded for a request.
        max_images: maximum number of images in a request.
        max_pixels: maximum total pixels of a request's images.
        max_held_bytes: maximum bytes of the bodies, downloaded images and prepared images of all requests together.
        max_held_images: maximum number of images of all requests together.
        max_prompt_tokens: maximum tokens of a prompt, images included; None for the model's context.
        max_answer_tokens: maximum tokens of an answer; also the default for requests without a limit.
        batch_size: maximum number of requests in a batch, and of answers to one request.
        queue: maximum number of other requests in the server; further ones get status 429.
        client_timeout: seconds for a client to send its request, and to read each part of the answer.
        fetch_timeout: seconds to download one image.
        open_metrics: whether /metrics needs no key.

    Raises:
        ValueError: a number below 1 (`queue`: below 0), an empty name or key, or a URL instead of a host.
    """

    name: str
    api_key: str | None = None
    image_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 2**25
    max_images: int = 8
    max_pixels: int | None = 50_000_000
    max_held_bytes: int = 2**30
    max_held_images: int = 64
    max_prompt_tokens: int | None = None
    max_answer_tokens: int = 1024
    batch_size: int = 8
    queue: int = 32
    client_timeout: float = 60.0
    fetch_timeout: float = 10.0
    open_metrics: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "max_body_bytes",
            "max_images",
            "max_held_bytes",
            "max_held_images",
            "max_prompt_tokens",
            "max_answer_tokens",
            "batch_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more.")
        if self.queue < 0:
            raise ValueError(f"queue is {self.queue}; expected 0 or more.")
        for name in ("client_timeout", "fetch_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected seconds above 0.")
        for host in self.image_hosts:
            image_host(host)
        if not self.name:
            raise ValueError("name is empty; expected the model's name for clients.")
        if self.api_key is not None:
            # Secret files often end with a line break, and header values are stripped.
            key = self.api_key.strip()
            if not key or not key.isascii() or not key.isprintable():
                raise ValueError(
                    "api_key is empty or not printable ASCII; expected a long random text, or none at all."
                )
            object.__setattr__(self, "api_key", key)

    @property
    def max_requests(self) -> int:
        """Maximum number of requests in the server: being read, waiting and being answered."""
        return self.batch_size + self.queue
