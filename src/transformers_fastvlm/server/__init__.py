# SPDX-License-Identifier: Apache-2.0
"""The server of `fastvlm serve`: OpenAI's chat completions over HTTP, by one model on one machine.

A request goes through `application` (limits, key, body), `json_bodies` and `protocol` or `response_objects` (to a
`ChatRequest`), `request_images` and `remote_images`, `preparation` (the model's inputs), the engine and
`answer_sending`. `server` listens, and ends on a signal.
"""

from .server import listen, serve
from .settings import Settings

__all__ = ["Settings", "listen", "serve"]
