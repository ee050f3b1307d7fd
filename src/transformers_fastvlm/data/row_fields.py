# SPDX-License-Identifier: Apache-2.0
"""The meaning of a row's fields, shared by loader, collator, check and evaluation.

A row whose image has an unknown key would be trained or evaluated without its image. So such a key is an error.
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
    """Return whether a field is empty: null, NaN (as in tables), or an empty list."""
    return value is None or (isinstance(value, float) and value != value) or (isinstance(value, list) and not value)


def images_of(row: Mapping[str, Any], inside: Iterable[Any] = ()) -> list[Any]:
    """Return the images of a row, or their names, in order.

    Args:
        row: a row in any format.
        inside: images in the parts of its messages.

    Raises:
        ValueError: images are given in more than one place or under an unknown key, or the row has video or audio.
    """
    inside = list(inside)
    for key in _OTHER_MEDIA:
        if row.get(key):
            raise ValueError(
                f"the row has {key!r}, but FastVLM takes text and images. Pass frames as images, or remove it."
            )
    beside = [row[key] for key in IMAGE_KEYS if not is_absent(row.get(key))]
    if len(beside) + bool(inside) > 1:
        raise ValueError("the row names images in more than one place; keep one of 'image', 'images' and image parts.")
    if beside:
        return list(beside[0]) if isinstance(beside[0], list | tuple) else beside
    if not inside:
        for key, value in row.items():
            if key not in _READ and _may_be_image(key, value):
                raise ValueError(
                    f"the row has no 'image', but {shortened(key)}, which is not read. Rename it to 'image' ('images' "
                    "for a list), or remove it if the row has no image."
                )
    return inside


def system_of(row: Mapping[str, Any]) -> str | None:
    """Return the system message in a row's own field; None if there is none.

    Raises:
        ValueError: it is not a string, or there are two.
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
    """Return the keys of a row that hold a value but are not read."""
    return [str(key) for key, value in row.items() if key not in _READ and not is_absent(value)]


def _may_be_image(key: Any, value: Any) -> bool:
    if is_absent(value) or value == "" or isinstance(value, bool | int | float):
        return False
    first = value[0] if isinstance(value, list | tuple) else value
    if isinstance(first, Image.Image) or (isinstance(first, Mapping) and set(first) == {"bytes", "path"}):
        return True
    return isinstance(key, str) and _NAMES_AN_IMAGE.fullmatch(re.sub(r"[^a-z0-9]", "", key.lower())) is not None
