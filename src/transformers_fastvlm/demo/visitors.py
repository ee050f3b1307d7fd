# SPDX-License-Identifier: Apache-2.0
"""Who looks at the page: each visitor's conversation, and what is freed when they leave."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .answering import Answerer, Reply, UnusableInput

__all__ = ["MAX_VISITORS", "Visitor", "Visitors"]

MAX_VISITORS = 32
"""Conversations that are kept at once; one more ends the one that was silent longest."""


@dataclass(eq=False)
class Visitor:
    """One visitor's conversation.

    Attributes:
        memory: what the engine remembers of it.
        messages: the conversation as the model is asked to continue it, pictures included.
        shown: the same as the page shows it.
        reply: the answer in the conversation that was asked for last.
        caption: the answer about a camera frame that was asked for last.
    """

    memory: Any
    messages: list[dict[str, Any]] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)
    reply: Reply | None = None
    caption: Reply | None = None

    @property
    def waits(self) -> bool:
        """Whether an answer in the conversation is on its way."""
        return self.reply is not None and not self.reply.done

    def stop(self) -> None:
        """Stop the answer in the conversation."""
        if self.reply is not None:
            self.reply.stop()

    def start_over(self) -> None:
        """Forget the conversation."""
        self.stop()
        self.messages, self.shown = [], []


class Visitors:
    """All visitors, by what Gradio calls the hash of their session.

    Args:
        answerer: what answers them.
        most: how many are kept; one more ends the conversation that was silent longest.
    """

    def __init__(self, answerer: Answerer, most: int = MAX_VISITORS) -> None:
        self._answerer, self._most = answerer, most
        self._known: OrderedDict[str, Visitor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._known))

    def come(self, session: str) -> Visitor:
        """Begin a conversation; one that the same page had ends."""
        self.leave(session)
        visitor = self._known[session] = Visitor(self._answerer.engine.new_memory())
        while len(self._known) > self._most:
            self.leave(next(iter(self._known)))
        return visitor

    def of(self, session: str) -> Visitor:
        """Return a visitor who is there.

        Raises:
            UnusableInput: the conversation was freed meanwhile.
        """
        if session not in self._known:
            raise UnusableInput(
                "This page was away for too long, and its conversation is gone. Press New conversation."
            )
        self._known.move_to_end(session)
        return self._known[session]

    def leave(self, session: str) -> None:
        """Stop a visitor's answers and free what was kept; nothing for one who is not there."""
        visitor = self._known.pop(session, None)
        if visitor is None:
            return
        visitor.start_over()
        if visitor.caption is not None:
            visitor.caption.stop()
        self._answerer.engine.forget(visitor.memory)
