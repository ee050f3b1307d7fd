# SPDX-License-Identifier: Apache-2.0
"""What the fields of a row mean, for everything that reads rows: loader, collator, check and evaluation.

A row whose image lies under a key that nobody reads would be trained, or judged, without it. So such a key is an error.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image

from .sample_errors import shortened

__all__ = ["IMAGE_KEYS", "SYSTEM_KEYS", "images_of", "is_absent", "system_of", "unread_keys"]

IMAGE_KEYS = ("image", "images")
SYSTEM_KEYS = ("system", "system_prompt")
_READ = ("id", "place", "conversations", "messages", *IMAGE_KEYS, *SYSTEM_KEYS)
_OTHER_MEDIA = ("video", "videos", "audio")
_NAMES_AN_IMAGE = re.compile(
    r"(?:the)?(?:image|img|picture|pic|photo|photograph)s?(?:file|filename|name|path|url|uri|src|source|bytes|data|base64)?s?"
    r"|filenames?|filepaths?|jpe?g|png"
)


def is_absent(value: Any) -> bool:
    """Whether a field holds nothing: null, NaN as tables have it, or an empty list."""
    return value is None or (isinstance(value, float) and value != value) or (isinstance(value, list) and not value)


def images_of(row: Mapping[str, Any], inside: Iterable[Any] = ()) -> list[Any]:
    """Return the images of a row, or their names, in order.

    Args:
        row: of any form.
        inside: those that its messages have in their parts.

    Raises:
        ValueError: they are in more than one place or under a key that is not read, or there is a video or a sound.
    """
    inside = list(inside)
    for key in _OTHER_MEDIA:
        if row.get(key):
            raise ValueError(
                f"the row has {key!r}, but FastVLM takes text and images. Give frames as images, or remove it."
            )
    beside = [row[key] for key in IMAGE_KEYS if not is_absent(row.get(key))]
    if len(beside) + bool(inside) > 1:
        raise ValueError("the row names images in more than one place; keep one of 'image', 'images' and parts.")
    if beside:
        return list(beside[0]) if isinstance(beside[0], list | tuple) else beside
    if not inside:
        for key, value in row.items():
            if key not in _READ and _may_be_image(key, value):
                raise ValueError(
                    f"the row has no 'image', but {shortened(key)}, which is not read. Call it 'image' ('images' for a "
                    "list), or remove it if the row is meant to have none."
                )
    return inside


def system_of(row: Mapping[str, Any]) -> str | None:
    """Return the system message that stands beside a row's turns; None if there is none.

    Raises:
        ValueError: it is no text, or there are two.
    """
    found = [(key, row[key]) for key in SYSTEM_KEYS if not is_absent(row.get(key)) and row[key] != ""]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"the row has both {' and '.join(map(repr, SYSTEM_KEYS))}; keep one.")
    key, value = found[0]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {shortened(value)}; expected the text of the system message.")
    return value


def unread_keys(row: Mapping[str, Any]) -> list[str]:
    """Return the keys of a row that hold something and are not read."""
    return [str(key) for key, value in row.items() if key not in _READ and not is_absent(value)]


def _may_be_image(key: Any, value: Any) -> bool:
    if is_absent(value) or value == "" or isinstance(value, bool | int | float):
        return False
    first = value[0] if isinstance(value, list | tuple) else value
    if isinstance(first, Image.Image) or (isinstance(first, Mapping) and set(first) == {"bytes", "path"}):
        return True
    return isinstance(key, str) and _NAMES_AN_IMAGE.fullmatch(re.sub(r"[^a-z0-9]", "", key.lower())) is not None
