# SPDX-License-Identifier: Apache-2.0
"""Errors in the format of OpenAI's API."""

from typing import Any

__all__ = ["ApiError"]

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused, or that failed.

    Args:
        status: HTTP status.
        message: the value, what was expected and what to do; the client sees it.
        code: machine-readable code, such as "model_not_found".
        param: the affected field of the request, such as "messages[0].content".
        headers: additional headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """JSON body of the response."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
