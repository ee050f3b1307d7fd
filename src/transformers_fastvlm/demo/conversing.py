# SPDX-License-Identifier: Apache-2.0
"""One turn of a visitor's conversation, from the question and its pictures to the whole answer."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from PIL import Image

from .answering import Answerer, Reply, UnusableInput
from .page_images import read_pictures
from .visitors import Visitor

__all__ = ["MAX_QUESTION", "summary", "turn"]

MAX_QUESTION = 20_000
"""Characters of a question."""

Show = Callable[[Image.Image, str], Any]


async def turn(
    answerer: Answerer, visitor: Visitor, question: str, files: Sequence[str], show: Show, system: str | None = None
) -> AsyncIterator[None]:
    """Answer a question; yield each time that `visitor.shown` has changed.

    Pictures begin a new conversation, and the one before ends; a question without goes on about those shown before.
    After an error the conversation is what it was before.

    Args:
        answerer: the model.
        visitor: who asks.
        question: text, not empty.
        files: paths of uploaded pictures.
        show: makes what the page shows of a picture, given that and words for those who cannot see it.
        system: system message in place of the chat template's own.

    Raises:
        UnusableInput: the question or a picture cannot be used, or an answer is still on its way.
    """
    if len(question) > MAX_QUESTION:
        raise UnusableInput(f"The question has {len(question)} characters; up to {MAX_QUESTION} can be asked at once.")
    pictures = await asyncio.to_thread(read_pictures, files)
    count = len(pictures)
    words = ["Your picture"] if count == 1 else [f"Your picture {number} of {count}" for number in range(1, count + 1)]
    small = [await asyncio.to_thread(show, *each) for each in zip(pictures, words, strict=True)]
    if visitor.waits:
        raise UnusableInput("An answer is still on its way. Wait for it, or press Stop.")
    before, shown_before = visitor.messages, visitor.shown
    content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": question}]
    messages = [*([] if pictures else before), {"role": "user", "content": content}]
    shown = [] if pictures else list(shown_before)
    shown += [{"role": "user", "content": one} for one in (*small, question)]
    opening = [] if system is None else [{"role": "system", "content": system}]
    reply = visitor.reply = answerer.ask([*opening, *messages], visitor.memory)
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
    """Return one line about how an answer came about."""
    if reply.first_token_seconds is None:
        return "Stopped." if reply.stopped else ""
    parts = [f"First token after {reply.first_token_seconds * 1000:.0f} ms"]
    if reply.encoded_images:
        parts.append("picture encoded" if reply.encoded_images == 1 else f"{reply.encoded_images} pictures encoded")
    elif reply.has_pictures:
        parts.append("nothing encoded again")
    if reply.stopped:
        parts.append("stopped")
    elif reply.cut:
        parts.append("cut at the longest length that is allowed")
    return "; ".join(parts) + "."
