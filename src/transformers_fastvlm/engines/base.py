# SPDX-License-Identifier: Apache-2.0
"""Questions and answers: a conversation, how it is to be answered, and what comes of it."""

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
"""Below it sampling is greedy: logits divided by less overflow, and the likeliest token has all the probability."""

MAX_TEMPERATURE = 2.0
"""As in OpenAI's API; answers are noise long before."""

MAX_SEED = 2**64 - 1
"""The largest that PyTorch's generators take."""

# Messages in Transformers' form:
# {"role": ..., "content": [{"type": "image", "image": PIL image}, {"type": "text", ...}]}.
Conversation = list[dict[str, Any]]

FinishReason = Literal["stop", "length", "cancelled"]
"""Why an answer ended: by itself or at a stop text, at its longest length, or because nobody wanted the rest."""


class PromptTooLong(ValueError):
    """A conversation fills the model's context.

    Attributes:
        tokens: of the conversation, those of images included.
        context: of the model.
    """

    def __init__(self, tokens: int, context: int) -> None:
        self.tokens, self.context = tokens, context
        super().__init__(
            f"the conversation has {tokens} tokens and fills the model's context of {context}, with no room for an "
            "answer. Shorten it, or use fewer or smaller images."
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is made; by default greedily.

    Args:
        max_new_tokens: tokens at which an answer is cut off.
        temperature: from 0 to 2. Below 1e-4 is greedy; larger is more varied.
        top_p: sample from the most probable tokens with this total probability, in (0, 1].
        seed: makes sampling repeatable on the same machine with the same versions; from 0 to 2**64 - 1. None: new
            random numbers each time. Neither uses or changes the random state of the caller.
        stop: texts at which an answer ends; they are not part of it.
        num_beams: of a beam search; above 1 for the engine transformers alone.

    Raises:
        ValueError: an option out of its range.
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
                "stop holds an empty text, at which every answer would end; expected texts of one or more."
            )

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest one."""
        return self.temperature < MIN_TEMPERATURE

    def of_row(self, index: int) -> "Sampling":
        """Return how the answer of an index is made where there are several: its seed is this one's plus the index."""
        return self if self.seed is None else replace(self, seed=(self.seed + index) % (MAX_SEED + 1))


GREEDY = Sampling()


@dataclass(frozen=True)
class Seconds:
    """How long the parts of an answer took.

    Attributes:
        prepare: decoding and processing images, and tokenizing.
        wait: for other requests.
        first_token: from the start of the model to the first token; None where tokens come all at once.
        generate: from the start of the model to the end.
    """

    prepare: float = 0.0
    wait: float = 0.0
    first_token: float | None = None
    generate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer. Two are equal if their texts, ends and numbers of tokens are.

    Attributes:
        text: without special tokens, stop text and surrounding white space.
        finish_reason: "stop", "length" (it was cut off) or "cancelled".
        prompt_tokens: those of images included.
        completion_tokens: of the answer, with the one that ended it.
        image_tokens: of the prompt's images.
        cached_tokens: of the prompt's, how many were not computed again.
        encoded_images: how many images were encoded for it; None where the engine does not tell.
        seconds: how long it took.
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
    """Return the tokens that end an answer, as a configuration's `eos_token_id` names them."""
    return set() if ids is None else set(ids) if isinstance(ids, list) else {ids}
