# SPDX-License-Identifier: Apache-2.0
"""Conversations, sampling options and answers."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .answer_schema import Schema

__all__ = [
    "MAX_LOGPROBS",
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
    "TokenLogprob",
    "end_tokens",
]

MIN_TEMPERATURE = 1e-4
"""Lower temperatures mean greedy decoding: dividing the logits by less would overflow."""

MAX_TEMPERATURE = 2.0
"""The maximum of OpenAI's API; answers become noise well below it."""

MAX_LOGPROBS = 20
"""The maximum of alternatives to a token, as in OpenAI's API."""

MAX_BIASES = 1024
"""The maximum number of tokens with a bias."""

MAX_SEED = 2**64 - 1
"""The maximum of PyTorch's generators."""

Conversation = list[dict[str, Any]]
"""Messages in Transformers' form, each `{"role": …, "content": …}`. A content is a string or a list of parts:
`{"type": "text", "text": …}`, or `{"type": "image", "image": …}` with a Pillow image."""

FinishReason = Literal["stop", "length", "cancelled"]
"""Why an answer ended: end token or stop string, maximum length, or cancellation."""


class PromptTooLong(ValueError):
    """A conversation fills the model's context.

    Attributes:
        tokens: number of tokens of the conversation, images included.
        context: context length of the model, in tokens.
    """

    def __init__(self, tokens: int, context: int) -> None:
        self.tokens, self.context = tokens, context
        super().__init__(
            f"the conversation has {tokens} tokens and fills the model's context of {context}, which leaves none "
            "for the answer. Shorten it, or use fewer or smaller images."
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
        stop: stop strings; they are not part of the answer.
        num_beams: beams of beam search; above 1 only for the engine transformers.
        schema: form that the answer must have; None for free text. An answer with finish reason "length" may be
            incomplete.
        logit_bias: token ids, each with a number from -100 to 100 that is added to its score; at most 1,024.
        presence_penalty: from -2 to 2; subtracted from the score of each token that the answer already has.
        frequency_penalty: from -2 to 2; subtracted once for each time that the answer already has the token.
        logprobs: number of the most probable tokens, 0 to 20, to report at each token of the answer; None for none.

    Raises:
        ValueError: an option is out of range, or two cannot be combined.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_beams: int = 1
    schema: Schema | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None

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
                "stop has an empty string, which would end every answer; expected strings of one or more characters."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number from -2 to 2.")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs is {self.logprobs}; expected a whole number from 0 to {MAX_LOGPROBS}.")
        self._check_biases()
        self._check_schema()

    def _check_biases(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias):,} tokens; expected at most {MAX_BIASES:,}.")
        for token, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias of token {token} is {bias}; expected a number from -100 to 100.")

    def _check_schema(self) -> None:
        if self.num_beams > 1 and self.changes_scores:
            raise ValueError(
                "beam search does not support schema, logit_bias, penalties or logprobs; leave num_beams at 1."
            )
        if self.schema is None:
            return
        if not isinstance(self.schema, Schema):
            raise ValueError(
                f"schema is a {type(self.schema).__name__}; expected Schema.json(...), Schema.regex(...) or "
                "Schema.choices(...)."
            )
        if self.stop:
            raise ValueError("stop and schema are both given, and a stop string could cut the answer; leave stop out.")

    @property
    def changes_scores(self) -> bool:
        """Whether biases, penalties or a schema change the model's scores, or logprobs report them."""
        changes = self.schema or self.logit_bias or self.presence_penalty or self.frequency_penalty
        return bool(changes) or self.logprobs is not None

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


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer, and its probability by the model.

    Attributes:
        token: its id.
        text: its text; a part of a character that takes several tokens is "\ufffd".
        logprob: natural logarithm of the probability that the model gave it, before temperature, top_p, biases,
            penalties and schema are applied.
        top: the most probable tokens at this position, most probable first; their `top` is empty.
    """

    token: int
    text: str
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer. Two answers are equal if text, finish reason and token counts are equal.

    Attributes:
        text: without special tokens, stop string and surrounding white space.
        finish_reason: "stop", "length" (it was cut off) or "cancelled".
        prompt_tokens: tokens of the prompt, images included.
        completion_tokens: tokens of the answer, including the end token.
        image_tokens: tokens of the prompt's images.
        cached_tokens: tokens of the prompt that were reused from the cache.
        encoded_images: number of images encoded for this answer; None if the engine does not report it.
        seconds: durations in seconds: `prepare`, `wait` (in the queue), `first_token` and `generate`.
        logprobs: one for each of `completion_tokens`, if `Sampling.logprobs` asked for them, else None.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    image_tokens: int = 0
    cached_tokens: int = field(default=0, compare=False)
    encoded_images: int | None = field(default=None, compare=False)
    seconds: Seconds = field(default=Seconds(), compare=False)
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, compare=False)


def end_tokens(ids: int | list[int] | None) -> set[int]:
    """Return the end tokens of a configuration's `eos_token_id`."""
    return set() if ids is None else set(ids) if isinstance(ids, list) else {ids}
