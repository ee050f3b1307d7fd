# SPDX-License-Identifier: Apache-2.0
"""Which requests are in the server: how many, and how many bytes and images they hold together."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable

from .api_errors import ApiError

__all__ = ["Admission", "Place"]


class Place:
    """The place of a request in the server, and what the request holds.

    Attributes:
        client: the client's address.
        refused: done, with the error, if the place was given to a client with fewer requests.
        is_settled: whether the request keeps its place until its end, since the model or the answer has begun.
        bytes, images: what it holds.
    """

    def __init__(self, admission: "Admission", client: str) -> None:
        self.client = client
        self.refused: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
        self.is_settled = False
        self.bytes = self.images = 0
        self._admission = admission

    def grow(self, count: int = 0, images: int = 0) -> None:
        """Hold more bytes or images; on any thread.

        Raises:
            ApiError: 429, all requests together hold too much.
        """
        self._admission._grow(self, count, images)

    def replace(self, count: int) -> None:
        """Replace the number of bytes held, after a conversion of the data; never refused."""
        with self._admission._lock:
            self.bytes = count

    def settle(self) -> None:
        """Keep the place until the end of the request."""
        self.is_settled = True

    def leave(self) -> None:
        """End the request."""
        self._admission._leave(self)


class Admission:
    """Bounds of all requests together, fair among clients.

    If the server is full, a client with fewer requests takes the place of the newest request of the client that
    has the most, unless the model has begun with that one.

    Args:
        most: maximum number of requests.
        max_bytes: maximum bytes of bodies, downloaded images and prepared images. A single request may hold more.
        max_images: maximum number of images. A single request may have more.
        seconds: returns the seconds after which a refused client may try again.
    """

    def __init__(self, most: int, max_bytes: int, max_images: int, seconds: Callable[[], int]) -> None:
        self.most, self.max_bytes, self.max_images, self._seconds = most, max_bytes, max_images, seconds
        self._places: list[Place] = []
        self._lock = threading.Lock()  # for the bytes and images of places

    @property
    def count(self) -> int:
        """Number of requests."""
        return len(self._places)

    @property
    def bytes(self) -> int:
        """Bytes that all requests hold."""
        return sum(place.bytes for place in list(self._places))

    @property
    def images(self) -> int:
        """Images that all requests have."""
        return sum(place.images for place in list(self._places))

    def check(self, client: str) -> None:
        """Raise ApiError (429) if a request of a client would be refused."""
        if self.count >= self.most and self._next_to_go(client, 1, self._places) is None:
            raise self._full(f"has {self.count} requests", "queue_full")

    def admit(self, client: str, count: int) -> Place:
        """Return a place for a request with a body of `count` bytes.

        Raises:
            ApiError: 429, the server is full.
        """
        self.check(client)
        if self.count >= self.most and (gone := self._next_to_go(client, 1, self._places)) is not None:
            self._refuse(gone)
        place = Place(self, client)
        self._places.append(place)
        try:
            self.ensure(place, count)
        except ApiError:
            place.leave()
            raise
        return place

    def ensure(self, place: Place, count: int = 0, images: int = 0) -> None:
        """`Place.grow`, in the event loop's thread; it may end other clients' newest requests.

        Raises:
            ApiError: 429, all requests together hold too much.
        """
        with self._lock:
            left, gone = list(self._places), []
            while self._excess(left, place, count, images) is not None:
                one = self._next_to_go(place.client, 0, left)
                if one is None:
                    break
                left.remove(one)
                gone.append(one)
            else:  # refuse only if that is enough
                for one in gone:
                    self._refuse(one)
        place.grow(count, images)

    def _grow(self, place: Place, count: int, images: int) -> None:
        with self._lock:
            excess = self._excess(self._places, place, count, images)
            if excess is not None:
                raise self._full(*excess)
            place.bytes += count
            place.images += images

    def _excess(self, places: list[Place], place: Place, count: int, images: int) -> tuple[str, str] | None:
        """Return what is full, and the code of the error, if a place cannot grow; a single one always can."""
        others = [one for one in places if one is not place]
        held, shown = sum(one.bytes for one in others), sum(one.images for one in others)
        if count and held and held + place.bytes + count > self.max_bytes:
            return f"holds {held + place.bytes} bytes of requests", "memory_full"
        if images and shown and shown + place.images + images > self.max_images:
            return f"holds {shown + place.images} images", "images_full"
        return None

    def _leave(self, place: Place) -> None:
        if place in self._places:
            self._places.remove(place)

    def _next_to_go(self, client: str, new: int, places: list[Place]) -> Place | None:
        """Return the place that a client with `new` more requests may take: that of a client with more than it."""
        counts = Counter(place.client for place in places)
        open_ones = [place for place in places if not place.is_settled]
        most = max((counts[place.client] for place in open_ones), default=0)
        if most <= counts[client] + new:
            return None
        return next(place for place in reversed(open_ones) if counts[place.client] == most)

    def _refuse(self, place: Place) -> None:
        place.leave()
        place.refused.set_result(self._full("gave the place of this request to another client", "queue_full"))

    def _full(self, what: str, code: str) -> ApiError:
        seconds = self._seconds()
        message = f"The server is full: it {what}. Try again in {seconds} seconds."
        return ApiError(429, message, code=code, headers={"retry-after": str(seconds)})
