# SPDX-License-Identifier: Apache-2.0
"""The JSON of answers, in the form of OpenAI's chat completions."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["chunk", "completion", "usage"]


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the token counts; the prompt's count includes images."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def completion(head: Mapping[str, Any], answers: Sequence[tuple[str, str]], tokens: dict[str, int]) -> dict[str, Any]:
    """Return a complete answer.

    Args:
        head: `id`, `created` and `model`.
        answers: text and finish_reason of each choice.
        tokens: see `usage`.
    """
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
        for index, (text, reason) in enumerate(answers)
    ]
    return {**head, "object": "chat.completion", "choices": choices, "usage": tokens}


def chunk(head: Mapping[str, Any], index: int, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    """Return a piece of a streamed answer, for the choice of this index."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}
