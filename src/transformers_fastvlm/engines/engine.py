# SPDX-License-Identifier: Apache-2.0
"""What the tools ask of whatever generates the answers."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .base import GREEDY, Answer, Conversation, Sampling
from .prompts import Prompt
from .request import Request

__all__ = ["Engine"]


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

    def stream(self, conversation: Conversation, sampling: Sampling = GREEDY, *, memory: Any = None) -> Request:
        """Begin to answer a conversation: `prepare` and `submit` in one.

        Returns:
            What yields the answer's text piece by piece, and has the whole as `result()`.

        Raises:
            ValueError: as `generate`.
        """

    def prepare(self, conversation: Conversation, *, memory: Any = None, literal: bool = False) -> Prompt:
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
        self, prompt: Prompt, *samplings: Sampling, memory: Any = None, changed: Callable[[], None] | None = None
    ) -> list[Request]:
        """Queue a prompt, once for each sampling. Others may be answered with it.

        Args:
            prompt: of `prepare`; several requests may share it.
            *samplings: how it is answered, each time.
            memory: see `new_memory`; used where nothing but this prompt is answered.
            changed: called on the engine's thread when there is something new: text, or an end.

        Raises:
            ValueError: a sampling has what this engine cannot do.
        """

    def new_memory(self) -> Any:
        """Return what keeps the keys, values and images of one conversation for its next question, or None."""

    def forget(self, memory: Any) -> None:
        """Free what a memory holds, once no request uses it any more; returns at once."""

    def close(self) -> None:
        """Answer what is queued, and give back threads, processes and memory."""
