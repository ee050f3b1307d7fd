# SPDX-License-Identifier: Apache-2.0
"""What the tools ask of whatever generates the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

__all__ = ["MAX_SEED", "MAX_TEMPERATURE", "MIN_TEMPERATURE", "Answer", "Conversation", "Engine", "Sampling"]

MIN_TEMPERATURE = 1e-4
"""Below it sampling is greedy: logits divided by less overflow, and the likeliest token has all the probability."""

MAX_TEMPERATURE = 2.0
"""As in OpenAI's API; answers are noise long before."""

MAX_SEED = 2**64 - 1
"""The largest that PyTorch's generators take."""

# Messages in Transformers' form:
# {"role": ..., "content": [{"type": "image", "image": PIL image}, {"type": "text", ...}]}.
Conversation = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are made; by default greedily.

    Args:
        max_new_tokens: tokens at which an answer is cut off.
        temperature: from 0 to 2. Below 1e-4 is greedy; larger is more varied.
        top_p: sample from the most probable tokens with this total probability, in (0, 1].
        seed: makes sampling repeatable on the same machine with the same versions; from 0 to 2**64 - 1.
        stop: texts at which an answer ends; they are not part of it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest one."""
        return self.temperature < MIN_TEMPERATURE


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer: its text, why it ended (`"length"`: it was cut off), and tokens of the prompt, with those of the
    images, and of the answer."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class Engine(Protocol):
    """A model that answers many conversations at once."""

    def generate(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Answer]:
        """Answer each conversation, in their order.

        Raises:
            ValueError: a conversation has an image without a place, a place without an image, or is too long for the
                model; none is answered then.
        """

    def close(self) -> None:
        """Give back processes and memory."""
