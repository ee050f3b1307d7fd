# SPDX-License-Identifier: Apache-2.0
"""The engine over Transformers: the only file of the engines that calls `generate()`."""

import copy
import gc
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..inference import PromptCache
from .base import end_tokens
from .engine import Engine
from .model_loading import find_device, load_model
from .prompts import Prompt
from .request import Request
from .row_sampling import RowChooser, RowSampling

__all__ = ["TransformersEngine"]

KEPT_MEMORIES = 4
"""Number of conversations whose keys and values are kept; older ones are prefilled again at their next question."""


class TransformersEngine(Engine):
    """An `Engine` with Transformers' `generate`.

    Waiting requests are batched, with padding on the left. Each row ends independently and samples with its own seed.
    A row's answer does not depend on the other rows, except for rounding: in half precision, two tokens with nearly
    equal scores may swap. A request alone in its batch reuses the common prefix with the last prompt of its memory
    (`PromptCache`). Options that `Sampling` lacks, such as a repetition penalty, come from the model's generation
    configuration, which is not changed.

    Args:
        model: directory or hub repository, or "tiny"; or a loaded `FastVLMForConditionalGeneration`, which only this
            engine may use.
        processor: processor of a loaded model.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's dtype, but float32 for a float16 checkpoint
            on a CPU.
        device: "auto" (CUDA, else Apple's GPU, else the CPU) or a torch device, such as "cuda:1".
        size: height and width, in pixels, that images are resized to, a multiple of 64; None for the checkpoint's.
        batch_size: maximum number of conversations in a batch, and of images in a batch of several conversations.

    Attributes:
        model: the loaded `FastVLMForConditionalGeneration`.
        processor: its `FastVLMProcessor`.

    Raises:
        ValueError: an invalid option, an unavailable device, or files of different checkpoints.
        OSError: there is no such checkpoint, or its files are damaged.

    Example:
        >>> engine = TransformersEngine("apple/FastVLM-0.5B")  # doctest: +SKIP
        >>> content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]  # doctest: +SKIP
        >>> engine.generate([[{"role": "user", "content": content}]])[0].text  # doctest: +SKIP
    """

    _NAME = "transformers"
    _BEAMS = True

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        size: int | None = None,
        batch_size: int = 16,
    ) -> None:
        if processor is None:
            model, processor = load_model(model, find_device(device), dtype, size)
        super().__init__(processor, batch_size)
        self.model = model
        self._kept: list[PromptCache] = []

    @property
    def device(self) -> str:
        """Device of the model."""
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        """dtype of the model."""
        return str(self.model.dtype).removeprefix("torch.")

    def new_memory(self) -> PromptCache:
        """See `Engine.new_memory`. Only the `KEPT_MEMORIES` most recently used memories keep their contents."""
        return PromptCache(self.model, self.processor)

    def forget(self, memory: PromptCache) -> None:
        """See `Engine.forget`."""
        with self._news:
            self._forgotten.append(memory)
            self._news.notify()

    def close(self) -> None:
        """Answer the queued requests, end the thread and free the memory; the engine cannot be used afterwards."""
        super().close()
        for memory in (*self._kept, *self._forgotten):
            memory.reset()
        self._kept.clear()
        self.model = self.processor = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _ends(self) -> set[int]:
        return end_tokens(self.model.generation_config.eos_token_id)

    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def _encoded(self, prompt: Prompt, memory: PromptCache | None = None) -> Prompt:
        ids = torch.tensor([prompt.expanded()])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.images:
            processing = self.processor.image_processor if memory is None else memory.process_images
            inputs |= processing(prompt.images, return_tensors="pt")
        prompt.inputs, prompt.images = inputs, []
        return prompt

    # In the model's thread

    def _goes_with(self, requests: list[Request], other: Request) -> bool:
        if requests[0].sampling.num_beams > 1 or other.sampling.num_beams > 1:
            return False
        together = [*requests, other]
        images = sum(len(one.prompt.image_tokens) for one in together)  # encoded together, so bounded
        return images <= (self.batch_size or images) or len({id(one.prompt) for one in together}) == 1

    def _answer(self, requests: list[Request]) -> None:
        first = requests[0]
        memory, inputs = first.memory, self._on_device(first.prompt.inputs)
        if len({id(one.prompt) for one in requests}) > 1:
            memory, inputs = None, self._on_device(_together(requests, self._pad()))
        elif len(requests) > 1:  # several answers to one prompt, which is prefilled once
            memory = memory or self.new_memory()
            inputs |= {name: inputs[name].expand(len(requests), -1) for name in ("input_ids", "attention_mask")}
        if memory is not None:
            self._keep(memory)
        if first.sampling.num_beams > 1:
            self._search(first, memory or self.new_memory(), inputs)
        else:
            choosers = [self._chooser(one) for one in requests]
            options = {
                "generation_config": self._config(max(one.room for one in requests)),
                "logits_processor": LogitsProcessorList([RowSampling(choosers)]),
                "stopping_criteria": StoppingCriteriaList([_Watch(requests, choosers)]),
            }
            (self.model if memory is None else memory).generate(**inputs, **options)
        for one in requests:
            one.encoded_images = len(one.prompt.image_tokens)
            if memory is not None:
                one.cached_tokens, one.encoded_images = memory.reused_tokens, memory.encoded_images

    def _search(self, request: Request, memory: PromptCache, inputs: dict[str, Tensor]) -> None:
        """Answer by beam search, whose tokens are known only at the end. It samples with PyTorch's random state."""
        sampling, config = request.sampling, self._config(request.room)
        config.num_beams, config.do_sample = sampling.num_beams, not sampling.greedy
        if config.do_sample:
            config.temperature, config.top_p, config.top_k = sampling.temperature, sampling.top_p, 0
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=not sampling.greedy):
            if not sampling.greedy:
                torch.seed() if sampling.seed is None else torch.manual_seed(sampling.seed)
            criteria = StoppingCriteriaList([_Cancelled(request)])
            output = memory.generate(**inputs, generation_config=config, stopping_criteria=criteria)
        for token in output[0, inputs["input_ids"].shape[1] :].tolist():
            if request.take(token):
                break

    def _on_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def _keep(self, memory: PromptCache) -> None:
        """Mark a memory as most recently used, and empty the oldest ones above the limit."""
        self._kept = [one for one in self._kept if one is not memory] + [memory]
        for old in self._kept[:-KEPT_MEMORIES]:
            old.reset()
        self._kept = self._kept[-KEPT_MEMORIES:]

    def _pad(self) -> int:
        config = self.model.generation_config
        pads = (config.pad_token_id, self.processor.tokenizer.pad_token_id, *sorted(self._ends()), 0)
        return next(pad for pad in pads if pad is not None)

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        """Return the model's configuration, changed for one greedy call of generate().

        No changed value is None: for None, generate() would take the model's value.
        """
        config = copy.deepcopy(self.model.generation_config)
        config.max_length, config.max_new_tokens = None, max_new_tokens
        config.do_sample, config.temperature, config.top_p, config.top_k = False, 1.0, 1.0, 50
        config.num_beams = config.num_return_sequences = 1
        config.return_dict_in_generate = config.output_scores = config.output_logits = False
        config.output_attentions = config.output_hidden_states = False
        config.use_cache, config.pad_token_id = True, self._pad()
        return config


class _Watch(StoppingCriteria):
    """Passes on each new token, and ends rows independently."""

    def __init__(self, requests: list[Request], choosers: list[RowChooser]) -> None:
        self.requests, self.choosers = requests, choosers

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Return for each row whether it is at its end, (rows,)."""
        tokens = input_ids[:, -1].tolist()
        ended = [request.take(token) for request, token in zip(self.requests, tokens, strict=True)]
        for chooser, end in zip(self.choosers, ended, strict=True):
            chooser.ended = chooser.ended or end
        return torch.tensor(ended, device=input_ids.device)


class _Cancelled(StoppingCriteria):
    """Ends all rows of a cancelled beam search."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Return for each row whether it is at its end, (rows,)."""
        return torch.full((len(input_ids),), self.request.cancelled, device=input_ids.device)


def _together(requests: list[Request], pad_token_id: int) -> dict[str, Tensor]:
    """Return a batch of prompts, padded on the left, with all images concatenated."""
    prompts = [request.prompt.inputs for request in requests]
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        own = prompt["input_ids"][0]
        ids[row, length - len(own) :] = own
        mask[row, length - len(own) :] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    for name in ("pixel_values", "image_sizes", "num_tiles"):
        parts = [prompt[name] for prompt in prompts if name in prompt]
        if parts:
            batch[name] = torch.cat(parts)
    return batch
