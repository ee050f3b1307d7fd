# SPDX-License-Identifier: Apache-2.0
"""Conversations before and after rendering: message parts in one form, frames of videos, masks of answers.

The processor uses this module. It does not depend on tokenizers or models.
"""

import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from .images.videos import spread, spread_frames

__all__ = [
    "DEFAULT_VIDEO_FRAMES",
    "MAX_VIDEO_FRAMES",
    "RENDERING",
    "answer_mask",
    "image_sources",
    "is_message",
    "known_role",
    "plain_message",
    "render_with_spans",
]

DEFAULT_VIDEO_FRAMES = 8
"""Default number of frames taken from a video in a message (`num_frames`)."""
MAX_VIDEO_FRAMES = 32
"""Maximum frames taken from one video: 8192 tokens at 1024 pixels, the trained context of the published models."""

RENDERING = threading.RLock()
"""Lock to hold while rendering for masks or labels and tokenizing the result.

Transformers shares compiled templates within a process; before 5.24 a template records the spans of one rendering at a
time. A tokenizer's padding is a state of the tokenizer.
"""

_IMAGE_SOURCES = ("image", "url", "path", "base64")
_VIDEO_SOURCES = ("video", "path", "url")


def is_message(value: Any) -> bool:
    """Whether `value` is one message, not a list of them: a mapping, or an object such as Pydantic's or OpenAI's."""
    return isinstance(value, Mapping) or hasattr(value, "role")


def plain_message(message: Any, num_frames: int = DEFAULT_VIDEO_FRAMES) -> dict[str, Any]:
    """Return a copy of a message with only text and image parts, each image with one source at most.

    Args:
        message: a role and a content, which is a string or a list of parts. Message and parts may be mappings,
            Pydantic models (as OpenAI's client returns them) or dataclasses; fields that are None are dropped.
        num_frames: frames taken from a video, 1 to 32.

    Raises:
        ValueError: an unknown part, a video without frames or one that cannot be read, or `num_frames` out of range.
        ImportError: a video file, but PyAV is not installed.
    """
    plain = _as_mapping(message)
    if plain is None:
        raise ValueError(f"A message is {str(message)[:100]!r}; expected a mapping or object with role and content.")
    content = plain.get("content")
    if not isinstance(content, list | tuple):
        return dict(plain)
    return {**plain, "content": [plain for part in content for plain in _plain_parts(part, num_frames)]}


def known_role(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with a role that the package's templates support; "developer" becomes "system".

    The templates themselves would render any role.

    Raises:
        ValueError: another role, tool calls, or no content.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise ValueError(f"A message has the role {str(role)[:100]!r}; expected 'system', 'user' or 'assistant'.")
    if message.get("tool_calls"):
        raise ValueError(
            f"A message of role {role!r} has tool_calls; the model was not trained to call tools. Remove them."
        )
    if content is None:
        raise ValueError(f"A message of role {role!r} has no content; expected a string or a list of parts.")
    return {**message, "role": "system"} if role == "developer" else message


def render_with_spans(
    chats: Sequence[Any], template: str, **variables: Any
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Render conversations; return each text and its spans in generation blocks. Thread-safe.

    Args:
        chats: conversations, each a list of messages.
        template: a Jinja template.
        variables: the template's variables, such as the names of special tokens.
    """
    # The comment makes this a different template from the one that other threads render without masks. It does not
    # change the text: Jinja strips the newline at the end anyway, and + keeps blanks before a comment.
    with RENDERING:
        texts, spans = render_jinja_template(
            conversations=list(chats),
            chat_template=template.removesuffix("\n") + "{#+ with spans #}",
            return_assistant_tokens_mask=True,
            **variables,
        )
    return texts, spans


def image_sources(message: Mapping[str, Any]) -> list[Any]:
    """Return the images (or paths, URLs, base64) of a message that `plain_message` returned, in order."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return [part[key] for part in parts if part["type"] == "image" for key in _IMAGE_SOURCES if key in part]


def _as_mapping(value: Any) -> Mapping[str, Any] | None:
    """Return a mapping unchanged, a Pydantic model or dataclass as a mapping without None values; otherwise None."""
    if isinstance(value, Mapping):
        return value
    if callable(getattr(value, "model_dump", None)):
        dumped: dict[str, Any] = value.model_dump(exclude_none=True)
        return dumped
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: own for name, own in found.items() if own is not None}
    return None


def _plain_parts(part: Any, num_frames: int) -> list[dict[str, Any]]:
    if isinstance(part, str):
        return [{"type": "text", "text": part}]
    mapping = _as_mapping(part)
    if mapping is not None:
        given = {key: value for key, value in mapping.items() if value is not None}
        kind = given.get("type") or next((key for key in ("text", "image", "image_url", "video") if key in given), None)
        if kind == "text" and "text" in given:
            return [{"type": "text", "text": given["text"]}]
        if kind == "image":
            source = next((key for key in _IMAGE_SOURCES if key in given), None)
            return [{"type": "image", source: given[source]} if source else {"type": "image"}]
        if kind == "image_url" and "image_url" in given:
            url = given["image_url"]
            return [{"type": "image", "url": url["url"] if isinstance(url, Mapping) else url}]
        if kind == "video":
            return [{"type": "image", "image": frame} for frame in _frames(given, num_frames)]
    raise ValueError(
        f"A part of a message is {str(part)[:100]!r}; expected type text with text, type image (with url, path, base64 "
        "or image), or type video (with video, path or url)."
    )


def _frames(part: Mapping[str, Any], num_frames: int) -> list[Any]:
    """Return `num_frames` frames of a video part, or all if there are fewer."""
    if not 1 <= num_frames <= MAX_VIDEO_FRAMES:
        raise ValueError(f"num_frames is {num_frames}; expected 1 to {MAX_VIDEO_FRAMES}.")
    video = next((part[key] for key in _VIDEO_SOURCES if key in part), None)
    if isinstance(video, str | os.PathLike):
        return spread_frames(video, num_frames)
    if video is None or len(video) == 0:
        raise ValueError("A video part has no frames; pass a list of frames or a file as video, or a path or url.")
    return [video[index] for index in spread(len(video), num_frames)]


def answer_mask(
    offsets: Sequence[Sequence[int]], replaced: Sequence[Mapping[str, Any]], spans: Sequence[tuple[int, int]]
) -> list[int]:
    """Return 1 for each token that shares a character with a span, else 0.

    Args:
        offsets: (start, end) of each token in the text after expansion; padding is (0, 0).
        replaced: the expansions, in order, with `span` before and `new_span` after.
        spans: (start, end) in the text before expansion.
    """

    def expanded(char: int) -> int:
        shift = 0
        for one in replaced:
            if one["span"][1] <= char:
                shift = one["new_span"][1] - one["span"][1]
        return char + shift

    wanted = [(expanded(start), expanded(end)) for start, end in spans]
    return [int(any(start < last and end > first for first, last in wanted)) for start, end in offsets]
