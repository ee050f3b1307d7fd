# SPDX-License-Identifier: Apache-2.0
"""The base class of engines with continuous batching: requests join and leave the model's rows at any token."""

import hashlib
import itertools
import logging
from collections import deque
from typing import Any, Protocol

from PIL import Image

from ..inference.image_table import ImageTable, StoredImage
from .engine import Engine, ended_engine
from .prompts import Prompt
from .request import Request

__all__ = ["BatchingEngine", "Rows"]

MAX_PIXELS = 1 << 20
"""Pixels of images that are encoded together, at least one image: more would let the running rows wait for long."""

GPU_PIXELS = 16 << 20
"""The same on a GPU, if no row is running."""

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """The running requests of a model, each a row that gets its next token in each step.

    Attributes:
        tokens: capacity of the cache in tokens.
    """

    tokens: int

    @property
    def running(self) -> list[Request]:
        """Requests that have a row."""

    @property
    def full(self) -> bool:
        """Whether no request can get a row now."""

    @property
    def stale(self) -> bool:
        """Whether the cache may hold another image under the ids of a new one; `clear` drops it."""

    def add(self, request: Request) -> None:
        """Give a request a row; its images must be encoded."""

    def remove(self, request: Request) -> None:
        """Take a request's row away."""

    def step(self) -> list[Request]:
        """Run one step of the model. Each row whose prompt is complete gets its next token.

        Returns:
            The requests that have ended or failed. They have no row any more.

        Raises:
            Exception: the step failed, and with it all rows: call `clear`.
        """

    def clear(self) -> list[Request]:
        """Take all rows away and drop the cache; return the requests that had a row."""

    def close(self) -> None:
        """Free the memory."""


class BatchingEngine(Engine):
    """An engine that gives each request a row, and each image virtual token ids; see `ImageTable`.

    Args:
        processor: see `Engine`.
        batch_size: maximum number of rows, and of images that are encoded together.
    """

    def __init__(self, processor: Any, batch_size: int) -> None:
        super().__init__(processor, batch_size)
        self.batch_size: int = batch_size
        self._images = ImageTable()
        self._rows: Any = None
        self._suspects: deque[Request] = deque()  # requests of a failed step; each is tried again alone

    def close(self) -> None:
        """Answer the queued requests, end the thread and free the memory; the engine cannot be used afterwards."""
        super().close()
        if self._rows is not None:
            self._rows.close()
        self._rows = None

    # For the engines

    @property
    def _encoder(self) -> Any:
        """What `ImageTable.encode` takes as the model."""
        raise NotImplementedError

    def _open_rows(self) -> Rows | None:
        """Return the rows; None if every request is answered alone."""
        raise NotImplementedError

    def _fits(self, request: Request, rows: Rows) -> bool:
        """Whether the rows can answer a request, once there is a free one."""
        return request.prompt.tokens + request.max_tokens <= rows.tokens

    def _next_unfit(self, rows: Rows) -> None:
        """Answer the first waiting request, which does not fit, or make it fit. No row is running."""
        raise NotImplementedError

    def _encoded(self, prompt: Prompt) -> Prompt:
        stored = [self._store(image, n) for image, n in zip(prompt.images, prompt.image_tokens, strict=True)]
        prompt.inputs = {"ids": prompt.expanded([image.ids for image in stored]), "images": stored}
        prompt.images = []
        return prompt

    def _store(self, image: Image.Image, tokens: int) -> StoredImage:
        """Return the image as the table has it, or process it and add it to the table."""
        digest = hashlib.blake2b(repr((image.mode, image.size, image.getpalette(), image.info)).encode())
        digest.update(image.tobytes())
        return self._images.find(digest.digest()) or self._images.add(
            digest.digest(), tokens, dict(self.processor.image_processor([image], return_tensors="pt"))
        )

    # In the model's thread

    def _work(self) -> None:
        try:
            while self._wait():
                if (rows := self._open_rows()) is None:
                    self._next_alone()
                else:
                    self._end_cancelled(rows)
                    self._admit(rows)
                    self._step(rows)
        finally:
            for request in (*self._suspects, *(self._rows.running if self._rows else ())):
                request.end(ended_engine())

    def _wait(self) -> bool:
        """Wait for something to do; return False at the end."""
        busy = bool(self._suspects or (self._rows and self._rows.running))
        with self._news:
            while not self._queue and not busy and not self._closed:
                self._openmp.release()
                self._news.wait()
            return bool(self._queue) or busy

    def _end_cancelled(self, rows: Rows) -> None:
        for request in rows.running:
            if request.cancelled:
                rows.remove(request)
                request.end()

    def _admit(self, rows: Rows) -> None:
        """Give waiting requests their rows, in the order of the queue."""
        if self._suspects:
            if not rows.running:
                self._begin(self._suspects.popleft(), rows)
            return
        encoded = False
        while request := self._first():
            running = len(rows.running)
            if not self._fits(request, rows):
                if not running:
                    self._next_unfit(rows)
                return
            if rows.full or (rows.stale and running) or self._computes_beginning_of(request, rows):
                return
            if rows.stale:
                rows.clear()
            if not all(image.encoded for image in request.prompt.inputs["images"]):
                if encoded and running:
                    return  # the others get a token first
                self._encode(alone=not running)
                encoded = True
            elif self._leave_queue(request):
                self._begin(request, rows)

    def _next_alone(self) -> None:
        request = self._first()
        if request is not None and self._leave_queue(request):
            request.start()
            self._answer_alone(request)

    def _first(self) -> Request | None:
        with self._news:
            return self._queue[0] if self._queue else None

    def _leave_queue(self, request: Request) -> bool:
        """Take a request out of the queue; return False if it is not there, since it was cancelled."""
        with self._news:
            if request not in self._queue:
                return False
            self._queue.remove(request)
        return True

    def _begin(self, request: Request, rows: Rows) -> None:
        """Give a request a row."""
        if request.begun_at is None:
            request.start()
        request.begin()
        try:
            self._chooser(request)
        except ValueError as error:
            request.end(error)
            return
        request.encoded_images = sum(image.count_once() for image in request.prompt.inputs["images"])
        rows.add(request)

    def _computes_beginning_of(self, request: Request, rows: Rows) -> bool:
        """Whether the next step computes much of a prompt's beginning, which the prompt can share afterwards."""
        ids = request.prompt.inputs["ids"]
        for one in rows.running:
            if not one.tokens:
                pairs = zip(ids, one.prompt.inputs["ids"], strict=False)
                if sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)) > len(ids) / 2:
                    return True
        return False

    def _step(self, rows: Rows) -> None:
        """Run one step of the model. If it fails, each of its requests is tried again alone."""
        if not rows.running:
            return
        try:
            ended = rows.step()
        except Exception as failure:
            logger.exception("a step of %d requests failed", len(rows.running))
            self._recover(failure)
            left = rows.clear()
            if len(left) == 1:
                left[0].end(failure)
            else:
                self._suspects += left
            return
        for request in ended:
            request.end()
            self._measure(request)

    def _encode(self, alone: bool) -> None:
        """Encode images of the first waiting requests together; if an image fails, its requests end.

        Args:
            alone: whether no row waits for its next token meanwhile.
        """
        with self._news:
            waiting = list(self._queue)[: self.batch_size]
        limit = GPU_PIXELS if alone and self._encoder.device.type != "cpu" else MAX_PIXELS
        group: list[StoredImage] = []
        for image in dict.fromkeys(image for one in waiting for image in one.prompt.inputs["images"]):
            if image.encoded:
                continue
            if group and (image.kind != group[0].kind or sum(one.pixels for one in group) + image.pixels > limit):
                break
            group.append(image)
        for request in waiting:
            if request.begun_at is None and any(image in group for image in request.prompt.inputs["images"]):
                request.start()
        try:
            self._images.encode(self._encoder, group)
        except Exception as failure:
            self._recover(failure)
            for image in group:
                self._encode_or_fail(image, waiting)

    def _encode_or_fail(self, image: StoredImage, waiting: list[Request]) -> None:
        try:
            self._images.encode(self._encoder, [image])
        except Exception as failure:
            logger.exception("an image cannot be encoded")
            self._recover(failure)
            for request in waiting:
                if image in request.prompt.inputs["images"] and self._leave_queue(request):
                    request.end(failure)
