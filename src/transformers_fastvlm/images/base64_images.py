# SPDX-License-Identifier: Apache-2.0
"""Base64 of image files: one decoder for processors, data, the server and the web page."""

import base64
import re

__all__ = ["from_base64", "is_data_url"]

_PREFIX = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_ONE_ALPHABET = bytes.maketrans(b"-_", b"+/")
_OTHERS = re.compile(rb"[^A-Za-z0-9+/]")
_PERCENT = [
    (code, character)
    for character in (b"+", b"/", b"=", b"\n", b"\r", b" ")
    for code in (b"%%%02X" % character[0], b"%%%02x" % character[0])
]


def is_data_url(text: str) -> bool:
    """Return whether a text begins with the prefix of a data: URL, such as `data:image/png;base64,`."""
    return _PREFIX.match(text) is not None


def from_base64(text: str) -> bytes:
    """Return the decoded bytes of base64, with or without the prefix of a data: URL.

    Accepts the standard and the URL-safe alphabet, percent-encoding, white space, and missing padding.

    Raises:
        ValueError: other characters, or an impossible length; the message is a clause whose subject is "it".
    """
    prefix = _PREFIX.match(text)
    code = text[prefix.end() if prefix else 0 :].encode("ascii", "replace")
    if b"%" in code:
        for encoded, character in _PERCENT:
            code = code.replace(encoded, character)
    code = code.translate(_ONE_ALPHABET, b" \t\r\n\v\f").rstrip(b"=")
    if other := _OTHERS.search(code):
        place = "before its end" if other[0] == b"=" else "which is not base64"
        raise ValueError(f"it has {other[0].decode()!r} at character {other.start()}, {place}")
    if len(code) % 4 == 1:
        raise ValueError(f"it has {len(code)} characters, an impossible length for base64; it may have been cut off")
    return base64.b64decode(code + b"=" * (-len(code) % 4))
