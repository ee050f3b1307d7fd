# SPDX-License-Identifier: Apache-2.0
"""From requests to what an engine is asked: pictures are opened while the batch before is answered."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..engines.base import Conversation
from ..engines.prompts import place_images
from ..images.decoding import FIRST_OF_SEVERAL, is_machine_fault
from ..images.videos import reason_of
from .planning import Batch
from .requests import Request

__all__ = ["Opened", "opened_ahead"]


@dataclass(frozen=True)
class Opened:
    """A request whose picture was opened.

    Attributes:
        index: number of its row.
        request: as planned.
        state: of the picture's file, from before it was opened; see `Request.file_state`.
        conversation: what is asked; None where that is not possible.
        error: why not.
        is_first: whether the picture is the first frame or page of several.
    """

    index: int
    request: Request
    state: Any
    conversation: Conversation | None = None
    error: str | None = None
    is_first: bool = False


def opened_ahead(batches: Iterable[Batch], system: str | None) -> Iterator[list[Opened]]:
    """Yield each batch opened; the next one is opened meanwhile.

    Args:
        batches: planned.
        system: message before each question; None for the chat template's own.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[list[Opened]] | None = None
        for batch in batches:
            following = pool.submit(lambda batch: [_open(*numbered, system) for numbered in batch], batch)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def _open(index: int, request: Request, system: str | None) -> Opened:
    state = request.file_state()
    if request.error is not None or request.question is None or request.picture is None:
        missing = "question" if request.question is None else "picture"
        return Opened(index, request, state, error=request.error or f"there is no {missing}.")
    try:
        image = request.picture()
        content = place_images(request.question, [image])
    except Exception as error:  # a damaged file must not end the run, whatever a decoder raises
        if is_machine_fault(error):
            raise
        return Opened(index, request, state, error=reason_of(error))
    before = [] if system is None else [{"role": "system", "content": system}]
    conversation: Conversation = [*before, {"role": "user", "content": content}]
    return Opened(index, request, state, conversation, is_first=FIRST_OF_SEVERAL in image.info)
