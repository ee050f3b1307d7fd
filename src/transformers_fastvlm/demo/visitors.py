# SPDX-License-Identifier: Apache-2.0
"""The page's visitors: their conversations, and the cleanup when they leave."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from .answering import Answerer, Reply, UnusableInput
from .page_images import read_images

__all__ = ["MAX_QUESTION", "MAX_VISITORS", "Visitor", "Visitors", "summary", "turn"]

MAX_QUESTION = 20_000
"""Maximum characters of a question."""

Show = Callable[[Image.Image, str], Any]

MAX_VISITORS = 32
"""Maximum number of conversations; the least recently used is dropped."""


@dataclass(eq=False)
class Visitor:
    """One visitor's conversation.

    Attributes:
        messages: the conversation for the model, images included.
        shown: the conversation for the page.
        reply: the latest answer in the conversation.
        caption: the latest answer about a camera frame.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)
    reply: Reply | None = None
    caption: Reply | None = None

    @property
    def waits(self) -> bool:
        """Whether an answer in the conversation is running."""
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
    """All visitors, by Gradio's session hash.

    Args:
        answerer: answers their questions.
        most: maximum number of conversations; the least recently used is dropped.
    """

    def __init__(self, answerer: Answerer, most: int = MAX_VISITORS) -> None:
        self._answerer, self._most = answerer, most
        self._known: OrderedDict[str, Visitor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._known))

    def come(self, session: str) -> Visitor:
        """Start a conversation; it replaces an earlier one of the same page."""
        self.leave(session)
        visitor = self._known[session] = Visitor()
        while len(self._known) > self._most:
            self.leave(next(iter(self._known)))
        return visitor

    def of(self, session: str) -> Visitor:
        """Return a present visitor.

        Raises:
            UnusableInput: the conversation was freed meanwhile.
        """
        if session not in self._known:
            raise UnusableInput(
                "This page was inactive for too long, and its conversation was dropped. Press New conversation."
            )
        self._known.move_to_end(session)
        return self._known[session]

    def leave(self, session: str) -> None:
        """Stop a visitor's answers and free the conversation; does nothing for an unknown visitor."""
        visitor = self._known.pop(session, None)
        if visitor is None:
            return
        visitor.start_over()
        if visitor.caption is not None:
            visitor.caption.stop()


async def turn(
    answerer: Answerer, visitor: Visitor, question: str, files: Sequence[str], show: Show, system: str | None = None
) -> AsyncIterator[None]:
    """Answer a question; yield each time that `visitor.shown` has changed.

    A question with images starts a new conversation; one without images continues the current one. An error leaves the
    conversation unchanged.

    Args:
        answerer: the model.
        visitor: the visitor who asks.
        question: text, not empty.
        files: paths of uploaded images.
        show: makes the page's element for an image, given the image and an alternative text.
        system: system message in place of the chat template's own.

    Raises:
        UnusableInput: the question or an image cannot be used, or an answer is still running.
    """
    if len(question) > MAX_QUESTION:
        raise UnusableInput(f"The question has {len(question)} characters; up to {MAX_QUESTION} can be asked at once.")
    images = await asyncio.to_thread(read_images, files)
    count = len(images)
    words = ["Your image"] if count == 1 else [f"Your image {number} of {count}" for number in range(1, count + 1)]
    small = [await asyncio.to_thread(show, *each) for each in zip(images, words, strict=True)]
    if visitor.waits:
        raise UnusableInput("An answer is still running. Wait for it, or press Stop.")
    before, shown_before = visitor.messages, visitor.shown
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    messages = [*([] if images else before), {"role": "user", "content": content}]
    shown = [] if images else list(shown_before)
    shown += [{"role": "user", "content": one} for one in (*small, question)]
    opening = [] if system is None else [{"role": "system", "content": system}]
    reply = visitor.reply = answerer.ask([*opening, *messages])
    visitor.shown = shown
    yield
    try:
        async for text in reply:
            if visitor.messages is not before:
                break
            visitor.shown = [*shown, {"role": "assistant", "content": text}]
            yield
    except Exception:
        if visitor.messages is before:
            visitor.shown = shown_before
        raise
    if visitor.messages is not before:  # started over meanwhile
        return
    visitor.messages = [*messages, {"role": "assistant", "content": reply.text}]
    visitor.shown = [*shown, {"role": "assistant", "content": reply.text or "(no answer)"}]
    yield


def summary(reply: Reply) -> str:
    """Return a one-line summary of an answer."""
    if reply.first_token_seconds is None:
        return "Stopped." if reply.stopped else ""
    parts = [f"First token after {reply.first_token_seconds * 1000:.0f} ms"]
    if reply.encoded_images:
        parts.append("image encoded" if reply.encoded_images == 1 else f"{reply.encoded_images} images encoded")
    elif reply.has_images:
        parts.append("image reused")
    if reply.stopped:
        parts.append("stopped")
    elif reply.cut:
        parts.append("cut at the maximum length")
    return "; ".join(parts) + "."
