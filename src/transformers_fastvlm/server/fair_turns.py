# SPDX-License-Identifier: Apache-2.0
"""Places for work that is bounded, given in an order that is fair among clients."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Hashable

__all__ = ["Turn", "Turns"]


class Turn:
    """A request for places, in the event loop's thread.

    Attributes:
        given: done when it has its places.
        size: number of places, requested or given.
    """

    def __init__(self, turns: "Turns", client: Hashable, size: int, number: int) -> None:
        self.client, self.size, self.number = client, size, number
        self.given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns = turns

    def keep(self, size: int) -> None:
        """Give places back until `size` are left; a turn without places has ended."""
        self._turns._keep(self, min(size, self.size))

    def end(self) -> None:
        """Give all places back, or stop waiting."""
        self.keep(0)


class Turns:
    """Places for the work of clients.

    The client that has the fewest places is next, then the one whose last turn is longest ago; the turns of one client
    keep their order. So a client with many requests uses all places while no other client waits, and delays another
    client's request by at most one of its own. A turn larger than all places gets them when all are free.

    Args:
        places: number of places.

    Attributes:
        waiting: turns without places, in order of arrival.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.waiting: list[Turn] = []
        self._used: Counter[Hashable] = Counter()
        self._last: dict[Hashable, int] = {}  # when a client last had a turn; only clients with places or in the queue
        self._numbers = itertools.count()

    def ask(self, client: Hashable, size: int = 1) -> Turn:
        """Return a new turn, which waits until there are `size` places for it."""
        turn = Turn(self, client, size, next(self._numbers))
        self.waiting.append(turn)
        self._give()
        return turn

    def _keep(self, turn: Turn, size: int) -> None:
        if turn in self.waiting:
            if size == 0:
                self.waiting.remove(turn)
        else:
            self._used[turn.client] -= turn.size - size
        turn.size = size
        self._forget(turn.client)
        self._give()

    def _give(self) -> None:
        while self.waiting:
            turn = min(self.waiting, key=self._rank)
            used = self._used.total()
            if used and used + turn.size > self.places:
                return  # nobody overtakes it, or it could wait for ever
            self.waiting.remove(turn)
            self._used[turn.client] += turn.size
            self._last[turn.client] = next(self._numbers)
            turn.given.set_result(None)

    def _rank(self, turn: Turn) -> tuple[int, int, int]:
        return self._used[turn.client], self._last.get(turn.client, -1), turn.number

    def _forget(self, client: Hashable) -> None:
        if self._used[client] == 0:
            del self._used[client]
            if not any(turn.client == client for turn in self.waiting):
                self._last.pop(client, None)
