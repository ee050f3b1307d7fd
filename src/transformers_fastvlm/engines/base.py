# SPDX-License-Identifier: Apache-2.0
"""Conversations, sampling options and answers."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

__all__ = [
    "MAX_SEED",
    "MAX_TEMPERATURE",
    "MIN_TEMPERATURE",
    "Answer",
    "Conversation",
    "GREEDY",
    "FinishReason",
    "PromptTooLong",
    "Sampling",
    "Seconds",
    "end_tokens",
]

MIN_TEMPERATURE = 1e-4
"""Lower temperatures mean greedy decoding: dividing the logits by less would overflow."""

MAX_TEMPERATURE = 2.0
"""The maximum of OpenAI's API; answers become noise well below it."""

MAX_SEED = 2**64 - 1
"""The maximum of PyTorch's generators."""

# Messages in Transformers' form:
# {"role": ..., "content": [{"type": "image", "image": PIL image}, {"type": "text", ...}]}.
Conversation = list[dict[str, Any]]

FinishReason = Literal["stop", "length", "cancelled"]
"""Why an answer ended: end token or stop text, maximum length, or cancellation."""


class PromptTooLong(ValueError):
    """A conversation fills the model's context.

    Attributes:
        tokens: number of tokens of the conversation, images included.
        context: context length of the model, in tokens.
    """

    def __init__(self, tokens: int, context: int) -> None:
        self.tokens, self.context = tokens, context
        super().__init__(
            f"the conversation has {tokens} tokens and fills the model's context of {context}, with no room for an "
            "answer. Shorten it, or use fewer or smaller images."
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of generation; the default is greedy decoding.

    Args:
        max_new_tokens: maximum number of tokens of an answer.
        temperature: from 0 to 2. Below 1e-4: greedy decoding. Higher values give more varied answers.
        top_p: sample from the most probable tokens with this total probability, in (0, 1].
        seed: makes sampling repeatable on the same machine with the same versions; from 0 to 2**64 - 1. None: new
            random numbers each time. The caller's random state is neither used nor changed.
        stop: texts at which an answer ends; they are not part of it.
        num_beams: beams of beam search; above 1 only for the engine transformers.

    Raises:
        ValueError: an option is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        if not 0 <= self.temperature <= MAX_TEMPERATURE:  # false for nan as well
            raise ValueError(
                f"temperature is {self.temperature}; expected a number from 0 (greedy) to {MAX_TEMPERATURE:g}."
            )
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is {self.seed}; expected a whole number from 0 to 2**64 - 1.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected above 0 and up to 1.")
        if "" in self.stop:
            raise ValueError(
                "stop has an empty text, which would end every answer; expected texts of one or more characters."
            )

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy."""
        return self.temperature < MIN_TEMPERATURE

    def of_row(self, index: int) -> "Sampling":
        """Return the options of one of several answers: its seed is this one's plus the index."""
        return self if self.seed is None else replace(self, seed=(self.seed + index) % (MAX_SEED + 1))


GREEDY = Sampling()


@dataclass(frozen=True)
class Seconds:
    """Durations of the parts of an answer, in seconds.

    Attributes:
        prepare: image decoding and processing, and tokenization.
        wait: time in the queue.
        first_token: from the start of the model to the first token; None if the answer is not streamed.
        generate: from the start of the model to the end of the answer.
    """

    prepare: float = 0.0
    wait: float = 0.0
    first_token: float | None = None
    generate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer. Two answers are equal if text, finish reason and token counts are equal.

    Attributes:
        text: without special tokens, stop text and surrounding white space.
        finish_reason: "stop", "length" (it was cut off) or "cancelled".
        prompt_tokens: tokens of the prompt, images included.
        completion_tokens: tokens of the answer, including the end token.
        image_tokens: tokens of the prompt's images.
        cached_tokens: tokens of the prompt that were reused from the cache.
        encoded_images: number of images encoded for this answer; None if the engine does not report it.
        seconds: durations.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    image_tokens: int = 0
    cached_tokens: int = field(default=0, compare=False)
    encoded_images: int | None = field(default=None, compare=False)
    seconds: Seconds = field(default=Seconds(), compare=False)


def end_tokens(ids: int | list[int] | None) -> set[int]:
    """Return the end tokens of a configuration's `eos_token_id`."""
    return set() if ids is None else set(ids) if isinstance(ids, list) else {ids}
