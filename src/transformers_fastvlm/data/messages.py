# SPDX-License-Identifier: Apache-2.0
"""The text of a row: conversion of the formats of data sets into one canonical form, and the checks of it.

In the canonical form a message is `{"role": "system" | "user" | "assistant", "content": str}`, and a user's content has
one "<image>" for each image, in order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..conversations import image_sources, plain_message
from ..tokens import IMAGE_TOKEN
from .row_fields import system_of
from .sample_errors import listed, shortened

__all__ = ["check_messages", "messages_and_sources"]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}


def messages_and_sources(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[Any]]:
    """Return the messages of a row in the canonical form, and the images named inside their parts.

    Args:
        row: a row with LLaVA's `conversations` (`from`, `value`) or with `messages` (`role`, `content`); a content is a
            string, or a list of parts `{"type": "text", "text": …}` and `{"type": "image"}`. A text in the `system` or
            `system_prompt` field becomes the first message.

    Raises:
        ValueError: both keys or neither are present, a turn has another format, or a role is unknown.
    """
    given = [key for key in ("conversations", "messages") if row.get(key) is not None]
    if len(given) != 1:
        found = "both" if given else f"neither; its keys are {listed(row)}"
        raise ValueError(f"expected 'messages' or LLaVA's 'conversations', but the row has {found}.")
    turns, (role_key, content_key) = row[given[0]], _KEYS[given[0]]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ValueError(
            f"{given[0]!r} is {shortened(turns)}; expected a list with at least one question and its answer."
        )
    messages: list[dict[str, str]] = []
    sources: list[Any] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not {role_key, content_key} <= turn.keys():
            raise ValueError(
                f"turn {index} of {given[0]!r} is {shortened(turn)}; expected an object with {role_key!r} and "
                f"{content_key!r}."
            )
        role, content = turn[role_key], turn[content_key]
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(
                f"turn {index} has the unknown role {shortened(role)}; expected "
                + ("'human', 'gpt' or 'system'." if role_key == "from" else "'user', 'assistant' or 'system'.")
            )
        if isinstance(content, list | tuple):
            _check_parts(content, index)
            plain = plain_message({"content": content})
            sources += image_sources(plain)
            content = _joined(plain["content"])
        if not isinstance(content, str):
            raise ValueError(
                f"turn {index} has the content {shortened(content)}; expected a string or a list of parts."
            )
        messages.append({"role": _ROLES[role], "content": content})
    system = system_of(row)
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    elif system is not None and messages[0]["content"] != system:
        raise ValueError("the row has a system message in its turns and a different one in its own field; keep one.")
    return messages, sources


_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}


def _check_parts(parts: Sequence[Any], turn: int) -> None:
    """Refuse parts that `plain_message` would read from disk or the network, and images numbered out of order."""
    numbers = []
    for part in parts:
        if isinstance(part, Mapping):
            if part.get("type") == "video" or part.get("video") is not None:
                raise ValueError(f"turn {turn} has a video; FastVLM takes text and images. Pass frames as images.")
            if part.get("type") == "image" and part.get("index") is not None:
                numbers.append(part["index"])
    if any(not isinstance(number, int) for number in numbers) or numbers != sorted(numbers):
        raise ValueError(f"turn {turn} numbers its images {numbers}; expected them in the order of the row's images.")


def check_messages(messages: Sequence[Mapping[str, str]], num_images: int) -> None:
    """Check a conversation in the canonical form against its number of images.

    Raises:
        ValueError: the turns do not alternate between user and assistant, the conversation does not start with a user
            and end with an answer, a question or an answer is empty, or the users' turns do not have exactly one
            placeholder for each image.
    """
    turns = list(messages)
    if turns and turns[0]["role"] == "system":
        turns = turns[1:]
    if not turns:
        raise ValueError("the conversation has no turns; expected at least one question and its answer.")
    for turn in messages:
        if not turn["content"].isascii():
            _check_characters(turn["content"])
    num_placeholders = 0
    for index, turn in enumerate(turns):
        role, content = turn["role"], turn["content"]
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            raise ValueError(_out_of_turn(role, expected, index))
        if role == "user":
            num_placeholders += content.count(IMAGE_TOKEN)
            if not content.strip():
                raise ValueError(
                    f"question {index // 2} (counting from 0) is empty. Write it, or remove the question and its "
                    "answer."
                )
        elif not content.strip():
            raise ValueError(
                f"answer {index // 2} (counting from 0) is empty, so there is nothing to train on. Write it, or remove "
                "the question and its answer."
            )
    if len(turns) % 2:
        raise ValueError("the conversation ends with a question. Add its answer, or remove the question.")
    stray = next((turn["role"] for turn in messages if turn["role"] != "user" and IMAGE_TOKEN in turn["content"]), None)
    if stray is not None:
        raise ValueError(
            f"a message with role {stray!r} has {IMAGE_TOKEN}, but only user messages may have images. Move it, or if "
            "it is meant literally, spell it differently, such as < image >."
        )
    if num_placeholders != num_images:
        raise ValueError(
            f"the text has {num_placeholders} {IMAGE_TOKEN}, but the row has {num_images} images. Write one "
            f"{IMAGE_TOKEN} for each image, in their order, into the users' turns."
        )


def _check_characters(content: str) -> None:
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of a turn is a lone surrogate, {content[error.start]!r}, which cannot be "
            "tokenized. Repair the text, for instance by writing the file again with ensure_ascii=False."
        ) from error


def _out_of_turn(role: str, expected: str, index: int) -> str:
    if index == 0 and role == "assistant":
        return "the conversation starts with the assistant. Remove that turn, or put the user's question before it."
    if role == "system":
        return "a system message is not the first message; move it to the start."
    if index == 0:
        return f"the conversation starts with role {role!r}; expected 'user'."
    return (
        f"turn {index} has role {role!r} where {expected!r} was expected: users and assistant must alternate. Join the "
        "turns, or remove one."
    )


def _joined(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return a string that the chat templates render like these parts.

    Text after an image starts on a new line, and so does an image after text. If a turn has a single image, it moves to
    the front.
    """
    text = words = ""
    images, after_image = 0, False
    for part in parts:
        if part["type"] == "image":
            text += ("\n" if text and not text.endswith("\n") else "") + IMAGE_TOKEN
            images, after_image = images + 1, True
            continue
        more = part["text"]
        if not isinstance(more, str):
            raise ValueError(f"a part of type 'text' has the text {shortened(more)}; expected a string.")
        if after_image and more and not more.startswith("\n"):
            text += "\n"
            words += "\n" if words and not words.endswith("\n") else ""
        if more:
            text, words, after_image = text + more, words + more, False
    return f"{IMAGE_TOKEN}\n{words.strip()}".strip() if images == 1 else text
