# SPDX-License-Identifier: Apache-2.0
"""A loaded model that answers conversations, for the verbs `generate` and `chat`."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..engines.base import MIN_TEMPERATURE
from .cli_errors import UserError, notice
from .model_sources import check_loadable, licence_notice, read_config
from .options import DtypeName

__all__ = ["Answer", "Sampling", "Session", "load", "remark"]

INCOMPLETE = "\ufffd"
"""What a tokenizer writes for a character of which only some bytes are there."""

_WINDOW = 32


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest; `top_p` and `seed` need one above 0."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    seed: int | None = None

    def check(self) -> None:
        """Raise UserError if an option would have no effect."""
        for name, value in (("--top-p", self.top_p), ("--seed", self.seed)):
            if value is not None and self.temperature < MIN_TEMPERATURE:
                raise UserError(
                    f"{name} has no effect at --temperature {self.temperature:g}, which never samples. Give a "
                    "temperature, such as 0.2."
                )
        if self.top_p == 0:
            raise UserError("--top-p is 0, which leaves no token to sample; expected above 0 and up to 1.")


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: without special tokens and surrounding white space.
        prompt_tokens, image_tokens, answer_tokens: numbers of tokens; those of images are part of the prompt's.
        stopped: "end" if the model ended its answer, "length" if it was cut, "interrupted" by the user.
        seconds: "preprocess", "generate" and "first_token" (from the start of generate; None with beams).
        remark: what a user should know of how it ended.
    """

    text: str
    prompt_tokens: int
    image_tokens: int
    answer_tokens: int
    stopped: Literal["end", "length", "interrupted"]
    seconds: dict[str, float | None]
    remark: str | None = None


def remark(answer: Answer) -> None:
    """Print on standard error what a user should know of how an answer ended."""
    if answer.remark:
        notice(f"fastvlm: {answer.remark}")


@dataclass
class Session:
    """A model and its processor, on their device."""

    name: str
    model: Any
    processor: Any
    load_seconds: float
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        from ..inference import PromptCache

        self._cache = PromptCache(self.model, self.processor)

    @property
    def device(self) -> str:
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def size(self) -> int:
        """Height and width, in pixels, of what the encoder sees."""
        return int(self.processor.image_processor.size["height"])

    def answer(self, conversation: list[dict[str, Any]], say: Callable[[str], None] = lambda text: None) -> Answer:
        """Continue a conversation; what it begins with like the last one is not computed again.

        Args:
            conversation: messages as `FastVLMProcessor.apply_chat_template` takes them.
            say: called with each piece of the answer as it comes.

        Raises:
            ValueError: a picture that cannot be used, or a conversation that does not fit into the context.
        """
        import torch

        start = time.perf_counter()
        inputs = self._cache.prepare(conversation)
        prompt = inputs["input_ids"]
        options, limit = self._options(prompt.shape[1])
        preprocessed = time.perf_counter()
        stream = _Stream(self.processor.tokenizer, say)
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)
        interrupted = False
        try:
            streamer = stream if self.sampling.num_beams == 1 else None
            output = self._cache.generate(**inputs, **options, streamer=streamer)
            tokens = output[0, prompt.shape[1] :].tolist()
        except KeyboardInterrupt:
            interrupted, tokens = True, stream.tokens
        end = time.perf_counter()
        text = stream.finish(tokens)
        ends = self.model.generation_config.eos_token_id
        ended = bool(tokens) and tokens[-1] in (ends if isinstance(ends, list) else [ends])
        return Answer(
            text=text.strip(),
            prompt_tokens=prompt.shape[1],
            image_tokens=int((prompt == self.processor.image_token_id).sum()),
            answer_tokens=len(tokens),
            stopped="interrupted" if interrupted else "end" if ended else "length",
            seconds={
                "preprocess": preprocessed - start,
                "first_token": None if stream.first is None else stream.first - preprocessed,
                "generate": end - preprocessed,
            },
            remark=None if ended or interrupted else limit,
        )

    def _options(self, prompt_tokens: int) -> tuple[dict[str, Any], str]:
        """Return generate()'s options, and what to say if the answer is cut by its length."""
        chosen = self.sampling
        # Set on the model: generate() takes a None as "not given", and falls back to the checkpoint's temperature.
        config = self.model.generation_config
        config.do_sample = chosen.temperature >= MIN_TEMPERATURE
        config.temperature = chosen.temperature if config.do_sample else None
        config.top_p = chosen.top_p
        if not config.do_sample:
            config.top_k = None
        context = self.processor.context_length
        room = chosen.max_new_tokens if context is None else min(chosen.max_new_tokens, context - prompt_tokens)
        if room < 1:
            raise UserError(
                f"the conversation has {prompt_tokens} tokens and fills the model's context of {context}, with no room "
                "for an answer. Shorten it, or use fewer or smaller pictures."
            )
        limit = f"the answer was cut after {room} tokens; "
        limit += (
            "--max-new-tokens allows longer ones." if room == chosen.max_new_tokens else "the model's context is full."
        )
        return {"max_new_tokens": room, "num_beams": chosen.num_beams}, limit


class _Stream:
    """A streamer for generate() that passes on text as soon as its characters are complete."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.tokens: list[int] = []
        self.first: float | None = None
        self._seen_prompt = False
        self._start = self._said = 0  # the window of tokens that is decoded, and the characters of it already said
        self._total = ""

    def put(self, tokens: Any) -> None:
        """Take new tokens; the first call brings the prompt."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        if self.first is None:
            self.first = time.perf_counter()
        self.tokens += tokens.flatten().tolist()
        text = self._decode(self._start)
        if text.endswith(INCOMPLETE):
            return
        self._pass_on(text[self._said :])
        self._said = len(text)
        if len(self.tokens) - self._start > 2 * _WINDOW:
            self._start = len(self.tokens) - _WINDOW
            self._said = len(self._decode(self._start))

    def end(self) -> None:
        """Called by generate() at the end; what is left is said by `finish`, also where generate() never streams."""

    def finish(self, tokens: list[int]) -> str:
        """Pass on what is left of the answer and return all of it."""
        self.tokens = tokens
        self._pass_on(self._decode(self._start)[self._said :])
        return self._total

    def _decode(self, start: int) -> str:
        text: str = self.tokenizer.decode(self.tokens[start:], skip_special_tokens=True)
        return text

    def _pass_on(self, text: str) -> None:
        if text:
            self._total += text
            self.say(text)


def load(model: str, device: str = "auto", dtype: DtypeName = DtypeName.auto, size: int | None = None) -> Session:
    """Load a checkpoint and its processor, and say on standard error what its licence restricts.

    Args:
        model: directory or hub repository.
        device: "auto" or a device of torch.
        dtype: "auto" is the checkpoint's, but float32 where that is float16 and the device a CPU.
        size: height and width of pictures, a multiple of 64; None for the checkpoint's own.

    Raises:
        UserError: no such checkpoint, or of another model.
        OSError, ValueError: no such device, or a damaged checkpoint.
    """
    config = read_config(model)
    check_loadable(model, config)

    from transformers.utils import logging

    from ..engines.model_loading import find_device, load_model

    place = find_device(device, "--device")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    start = time.perf_counter()
    loaded, processor = load_model(model, place, dtype.value, size)
    seconds = time.perf_counter() - start
    if message := licence_notice(model, config):
        notice(message)
    return Session(model, loaded, processor, seconds)
