# SPDX-License-Identifier: Apache-2.0
"""The JSON of answers, in the form of OpenAI's chat completions."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..engines import Answer, TokenLogprob
from .protocol import ChatRequest

__all__ = ["ChatForm"]

_LEAST_LOGPROB = -9999.0


class ChatForm:
    """Writes the answers to one request.

    Args:
        chat: the request.
        model: name of the model.

    Attributes:
        id: of the answer.
    """

    def __init__(self, chat: ChatRequest, model: str) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._chat = chat
        self._head = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the body of a response that is not streamed; `answers` are those of all choices."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None if answer.logprobs is None else _logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": _usage(answers)}

    def first(self) -> list[Any]:
        """Return the events that begin a stream: JSON values or texts."""
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self._chat.n)]

    def piece(self, index: int, text: str, tokens: Sequence[TokenLogprob]) -> list[Any]:
        """Return the events for new text of a choice, and the tokens that came with it, if asked for."""
        return [self._chunk(index, {"content": text}, tokens=tokens)]

    def last(self, answers: Sequence[Answer]) -> list[Any]:
        """Return the events that end a stream."""
        ends = [self._chunk(index, {}, answer.finish_reason) for index, answer in enumerate(answers)]
        if self._chat.include_usage:
            ends.append({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(answers)})
        return [*ends, "[DONE]"]

    def _chunk(
        self, index: int, delta: dict[str, str], reason: str | None = None, tokens: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        logprobs = _logprobs(tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._chat.include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [_token(token) | {"top_logprobs": [_token(one) for one in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> dict[str, Any]:
    # A part of a character is no text, and JSON has no infinity: the client's own limit for what is impossible.
    data = None if "\ufffd" in token.text else list(token.text.encode())
    return {"token": token.text, "logprob": max(token.logprob, _LEAST_LOGPROB), "bytes": data}


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Return the token counts; the prompt's count includes images."""
    prompt, completion = answers[0].prompt_tokens, sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
