# SPDX-License-Identifier: Apache-2.0
"""Open images and make conversations, while the previous batch is answered."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

from ..engines.base import Conversation
from ..engines.prompts import place_images
from ..images.decoding import FIRST_OF_SEVERAL, is_machine_fault
from ..images.opening_ahead import opened_one_ahead
from ..images.videos import reason_of
from .planning import Batch
from .requests import Request

__all__ = ["Opened", "opened_ahead"]


@dataclass(frozen=True)
class Opened:
    """A request with an opened image.

    Attributes:
        index: number of its row.
        request: the planned request.
        state: state of the image's file before it was opened; see `Request.file_state`.
        conversation: the conversation; None after an error.
        error: the error.
        is_first: whether the image is the first of several frames or pages.
    """

    index: int
    request: Request
    state: Any
    conversation: Conversation | None = None
    error: str | None = None
    is_first: bool = False


def opened_ahead(batches: Iterable[Batch], system: str | None) -> Generator[list[Opened]]:
    """Yield opened batches; the next one is opened in the background.

    Args:
        batches: planned batches.
        system: system message; None for the chat template's.
    """
    return opened_one_ahead(lambda batch: [_open(*numbered, system) for numbered in batch], batches)


def _open(index: int, request: Request, system: str | None) -> Opened:
    state = request.file_state()
    if request.error is not None or request.question is None:
        return Opened(index, request, state, error=request.error or "there is no question.")
    try:
        images = [] if request.open_image is None else [request.open_image()]
        content = place_images(request.question, images)
    except Exception as error:  # a damaged file must not end the run, and decoders raise any exception
        if is_machine_fault(error):
            raise
        return Opened(index, request, state, error=reason_of(error))
    before = [] if system is None else [{"role": "system", "content": system}]
    conversation: Conversation = [*before, {"role": "user", "content": content}]
    return Opened(index, request, state, conversation, is_first=any(FIRST_OF_SEVERAL in image.info for image in images))
