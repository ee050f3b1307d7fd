# SPDX-License-Identifier: Apache-2.0
"""What the person who runs the server decides; clients can change none of it."""

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and names of a server.

    Args:
        name: what clients call the model.
        api_key: what clients must send as `Authorization: Bearer KEY`; None to ask for nothing.
        image_hosts: hosts, as "name" or "name:port", from which pictures may be fetched.
        max_body_bytes: of a request's body, and of all the pictures together that a request has fetched.
        max_images: pictures in a request.
        max_pixels: of all pictures of a request together.
        max_prompt_tokens: tokens of a prompt, those of pictures included; None for the model's context.
        max_answer_tokens: of one answer; also where a request names no limit.
        batch_size: requests that are answered together at most, and answers to one request.
        queue: requests that may be in the server beside those; more are answered 429.
        client_timeout: seconds that a client has for sending its request, and for taking each piece of the answer.
        fetch_timeout: seconds for fetching one picture.
        do_exif_transpose: whether pictures are turned as their EXIF orientation says.

    Raises:
        ValueError: a number below 1 (`queue`: below 0), an empty name or key, an address in place of a host.
    """

    name: str
    api_key: str | None = None
    image_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 2**25
    max_images: int = 8
    max_pixels: int = 50_000_000
    max_prompt_tokens: int | None = None
    max_answer_tokens: int = 1024
    batch_size: int = 8
    queue: int = 32
    client_timeout: float = 60.0
    fetch_timeout: float = 10.0
    do_exif_transpose: bool = True

    def __post_init__(self) -> None:
        for name in (
            "max_body_bytes",
            "max_images",
            "max_pixels",
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
            if not host or "/" in host or "*" in host:
                raise ValueError(
                    f"an image host is {host!r}; expected a name such as images.example.com, or name:port."
                )
        if not self.name:
            raise ValueError("name is empty; expected what clients are to call the model.")
        if self.api_key is not None and not (self.api_key.strip() and self.api_key.isascii()):
            raise ValueError("api_key is empty or not ASCII; expected a long random text, or none at all.")

    @property
    def max_requests(self) -> int:
        """Requests that are in the server at once: being read, waiting and being answered."""
        return self.batch_size + self.queue
