# SPDX-License-Identifier: Apache-2.0
"""The engine over Transformers: one process, batches of similar length, padded on the left."""

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .base import Answer, Conversation, Sampling
from .model_loading import find_device, load_model
from .prompts import Prompt, check_sampling, read_prompts, tokenizer_options

__all__ = ["TransformersEngine"]


class TransformersEngine:
    """A FastVLM that answers conversations with Transformers' `generate`.

    The model runs on rows of similar length together, each padded on the left to the longest. What a row is answered
    does not depend on the others, but for sums in another order: in half precision two tokens of nearly the same score
    may change places. An engine serves one thread at a time.

    Args:
        model: directory or hub repository, or "tiny".
        dtype: "auto" is the checkpoint's own, but float32 where that is float16 and the device a CPU; or "float32",
            "bfloat16", "float16".
        device: "auto" (CUDA, else Apple's GPU, else the CPU) or a device of torch, such as "cuda:1".
        size: height and width, in pixels, that pictures are resized to, a multiple of 64; None for the checkpoint's.
        batch_size: most conversations that run through the model together.

    Attributes:
        model: the loaded `FastVLMForConditionalGeneration`.
        processor: its `FastVLMProcessor`.

    Raises:
        ValueError: an option that is none of these, a device that is not there, or files of different checkpoints.
        OSError: there is no such checkpoint, or its files are damaged.

    Example:
        >>> engine = TransformersEngine("apple/FastVLM-0.5B")  # doctest: +SKIP
        >>> content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]  # doctest: +SKIP
        >>> engine.generate([[{"role": "user", "content": content}]], Sampling())  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        size: int | None = None,
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
        self.batch_size = batch_size
        self.model, self.processor = load_model(model, find_device(device), dtype, size)

    def generate(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Answer]:
        """Answer each conversation, in their order.

        All of them are checked, and their pictures decoded, before the model runs.

        Raises:
            ValueError: a conversation has an image without a place, a place without an image, an image that cannot be
                used, or fills the model's context; or an option of `sampling` is out of range. None is answered then.
        """
        check_sampling(sampling)
        prompts = read_prompts(self.processor, conversations, self.processor.context_length)
        self._set_options(sampling)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        # The longest first: if memory does not suffice, that shows at once.
        order = sorted(range(len(prompts)), key=lambda index: -prompts[index].tokens)
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            answers.update(zip(rows, self._answers([prompts[row] for row in rows], sampling), strict=True))
        return [answers[index] for index in range(len(prompts))]

    def close(self) -> None:
        """Give back the model's memory; the engine cannot be used after that."""
        self.model = self.processor = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _set_options(self, sampling: Sampling) -> None:
        """Set how tokens are chosen.

        On the model: generate() takes a None as "not given", and falls back to the checkpoint's temperature.
        """
        config = self.model.generation_config
        config.do_sample = not sampling.greedy
        config.temperature = sampling.temperature if config.do_sample else None
        config.top_p = sampling.top_p if config.do_sample else None
        config.top_k = 0 if config.do_sample else None

    def _answers(self, prompts: list[Prompt], sampling: Sampling) -> Iterator[Answer]:
        texts = [prompt.text for prompt in prompts]
        images = [prompt.images for prompt in prompts]
        inputs = self.processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **tokenizer_options(self.processor.tokenizer, texts[0]),
        ).to(self.model.device)
        lengths = inputs["attention_mask"].sum(-1).tolist()
        context = self.processor.context_length
        rooms = [sampling.max_new_tokens if context is None else context - length for length in lengths]
        rooms = [min(room, sampling.max_new_tokens) for room in rooms]
        options: dict[str, Any] = {}
        if sampling.stop:
            options = {"stop_strings": list(sampling.stop), "tokenizer": self.processor.tokenizer}
        output = self.model.generate(**inputs, **options, max_new_tokens=max(rooms))
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        for length, room, tokens in zip(lengths, rooms, new, strict=True):
            yield self._answer(tokens[:room], length, sampling.stop)

    def _answer(self, tokens: list[int], prompt_tokens: int, stop: tuple[str, ...]) -> Answer:
        """Return the answer that a row's new tokens are, up to its end; after that there is padding."""
        config = self.model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        last = next((index for index, token in enumerate(tokens) if token in ends), None)
        ended = last is not None
        if last is not None:
            tokens = tokens[: last + 1]
        elif stop:
            last = next((index for index, token in enumerate(tokens) if token == config.pad_token_id), len(tokens))
            tokens = tokens[:last]
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        found = [at for at in (text.find(words) for words in stop) if at >= 0]
        return Answer(
            text=(text[: min(found)] if found else text).strip(),
            finish_reason="stop" if ended or found else "length",
            prompt_tokens=prompt_tokens,
            completion_tokens=len(tokens),
        )
