# SPDX-License-Identifier: Apache-2.0
"""What the tools ask of whatever generates the answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from .prompts import Prompt
    from .request import Request

__all__ = [
    "MAX_SEED",
    "MAX_TEMPERATURE",
    "MIN_TEMPERATURE",
    "Answer",
    "Conversation",
    "Engine",
    "GREEDY",
    "FinishReason",
    "PromptTooLong",
    "Sampling",
    "Seconds",
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

    prepare: float
    wait: float
    first_token: float | None
    generate: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer. Two are equal if their texts, ends and numbers of tokens are.

    Attributes:
        text: without special tokens, stop text and surrounding white space.
        finish_reason: "stop", "length" (it was cut off) or "cancelled".
        prompt_tokens: those of images included.
        image_tokens: of the prompt's images.
        completion_tokens: of the answer, with the one that ended it.
        cached_tokens: of the prompt's, how many were not computed again.
        encoded_images: how many images were encoded for it; None where the engine does not tell.
        seconds: how long it took; None where the engine does not tell.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    cached_tokens: int = field(default=0, compare=False)
    encoded_images: int | None = field(default=None, compare=False)
    seconds: Seconds | None = field(default=None, compare=False)


class Engine(Protocol):
    """A model that answers conversations. Its methods may be called from several threads at once.

    Attributes:
        processor: the checkpoint's `FastVLMProcessor`.
        context: most tokens of a conversation and its answer; None for any number.
        device, dtype: where and in what the model computes, such as "cpu" and "float32".
        size: height and width, in pixels, that images are resized to.
        is_alive: whether requests are answered; False after `close`, and where the model cannot go on.
        batch_seconds: that the latest requests took, as a moving average.
    """

    processor: Any

    @property
    def context(self) -> int | None: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def batch_seconds(self) -> float: ...

    def generate(
        self, conversations: Sequence[Conversation], sampling: Sampling | Sequence[Sampling] = GREEDY
    ) -> list[Answer]:
        """Answer conversations, in their order.

        All of them are checked, and their images decoded, before the model runs.

        Args:
            conversations: see `Conversation`.
            sampling: one for all, or one for each. With one seed for all, each conversation has a seed of its own,
                which is that seed plus its index.

        Raises:
            ValueError: a conversation has an image without a place, a place without an image, an image that cannot be
                used, or fills the model's context; or `sampling` has what this engine cannot do. None is answered then.
        """

    def stream(self, conversation: Conversation, sampling: Sampling = GREEDY, *, memory: Any = None) -> "Request":
        """Begin to answer a conversation: `prepare` and `submit` in one.

        Returns:
            What yields the answer's text piece by piece, and has the whole as `result()`.

        Raises:
            ValueError: as `generate`.
        """

    def prepare(self, conversation: Conversation, *, memory: Any = None, literal: bool = False) -> "Prompt":
        """Check a conversation, decode its images and make the model's inputs, in the thread that calls.

        Args:
            conversation: see `Conversation`.
            memory: see `new_memory`; images that it knows are not processed again.
            literal: control tokens in texts, `<image>` included, are text like any other.

        Raises:
            PromptTooLong: it fills the model's context.
            ValueError: as `generate`.
        """

    def submit(
        self,
        prompt: "Prompt",
        sampling: Sampling = GREEDY,
        *,
        memory: Any = None,
        changed: Callable[[], None] | None = None,
    ) -> "Request":
        """Queue a prompt, which others may be answered with, each by its own sampling.

        Args:
            prompt: of `prepare`; several requests may share it.
            sampling: how it is answered.
            memory: see `new_memory`; used where the request is answered alone.
            changed: called on the engine's thread when there is something new: text, or the end.

        Raises:
            ValueError: `sampling` has what this engine cannot do.
        """

    def new_memory(self) -> Any:
        """Return what keeps the keys, values and images of one conversation for its next question, or None."""

    def forget(self, memory: Any) -> None:
        """Free what a memory holds, once no request uses it any more; returns at once."""

    def close(self) -> None:
        """Answer what is queued, and give back threads, processes and memory."""
