# SPDX-License-Identifier: Apache-2.0
"""The engine over Transformers: its continuous batching, or `generate()` where that cannot be used."""

import copy
import gc
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .. import compat
from ..inference import PromptCache
from .base import end_tokens
from .batching_engine import BatchingEngine, Rows
from .continuous_rows import ContinuousRows
from .model_loading import find_device, load_model
from .request import Request
from .row_sampling import RowSampling

__all__ = ["TransformersEngine"]

ROW_TOKENS = 1024
"""Capacity of the cache in tokens per row, on average."""

MAX_TOKENS = 32768
"""Maximum capacity of the cache in tokens, unless all rows need more; a longer conversation is answered alone."""

logger = logging.getLogger(__name__)


class TransformersEngine(BatchingEngine):
    """An `Engine` with Transformers' continuous batching.

    Each request gets a row: it joins the others as soon as a row is free, gets one token in each step of the
    model, and leaves when its answer ends. Waiting requests get their rows in order. Between two steps at most one
    image is encoded, unless no row is running. A row's answer does not depend on the other rows, except for rounding:
    in half precision, two tokens with nearly equal scores may swap. If prompts begin with the same tokens and images,
    such as the questions of a conversation, this common prefix is computed only once.

    `generate()` answers some requests one by one, while the others wait: beam search, conversations that are longer
    than the cache, and all requests if Transformers has no paged cache for the language model.

    Options that `Sampling` lacks, such as a repetition penalty, come from the model's generation configuration, which
    is not changed.

    Args:
        model: directory or hub repository, or "tiny"; or a loaded `FastVLMForConditionalGeneration`, which only this
            engine may use.
        processor: processor of a loaded model.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's dtype, but float32 for a float16 checkpoint
            on a CPU.
        device: "auto" (CUDA, else Apple's GPU, else the CPU) or a torch device, such as "cuda:1".
        size: height and width, in pixels, that images are resized to, a multiple of 64; None for the checkpoint's.
        batch_size: maximum number of rows, and of images that are encoded together.

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
        self._paged = True
        self._alone = PromptCache(model, processor)

    @property
    def device(self) -> str:
        """Device of the model."""
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        """dtype of the model."""
        return str(self.model.dtype).removeprefix("torch.")

    def close(self) -> None:
        """Answer the queued requests, end the thread and free the memory; the engine cannot be used afterwards."""
        paged = self._rows is not None
        super().close()
        if paged:
            compat.close_pages(self.model)
        self._alone.reset()
        self.model = self.processor = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _ends(self) -> set[int]:
        return end_tokens(self.model.generation_config.eos_token_id)

    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def _encoder(self) -> Any:
        return self.model

    def _fits(self, request: Request, rows: Rows) -> bool:
        return request.sampling.num_beams == 1 and super()._fits(request, rows)

    def _next_unfit(self, rows: Rows) -> None:
        self._next_alone()

    # In the model's thread

    def _open_rows(self) -> Rows | None:
        if self._rows is None and self._paged:
            tokens = max(ROW_TOKENS * self.batch_size, min(self.context or MAX_TOKENS, MAX_TOKENS))
            options: dict[str, Any] = {"rows": self.batch_size, "tokens": tokens}
            try:
                compat.check_pages(self.model)
                self._rows = ContinuousRows(self.model, self._images, self._config(1), **options)
            except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
                self._paged = False
                kind = type(self.model.get_decoder()).__name__
                logger.warning("requests are answered one by one: %s has no paged cache (%s)", kind, error)
        rows: Rows | None = self._rows
        return rows

    def _answer(self, request: Request) -> None:
        """Answer a request by generate()."""
        images = request.prompt.inputs["images"]
        for image in images:
            self._images.encode(self.model, [image])
        ids = torch.tensor([request.prompt.expanded()], device=self.model.device)
        inputs: dict[str, Any] = {"input_ids": ids, "image_features": [image.features for image in images]}
        with compat.plain_attention(self.model):
            if request.sampling.num_beams > 1:
                self._search(request, inputs)
            else:
                processors = LogitsProcessorList([RowSampling([self._chooser(request)])])
                criteria = StoppingCriteriaList([_Watch(request)])
                self._alone.generate(
                    **inputs,
                    generation_config=self._config(request.max_tokens),
                    logits_processor=processors,
                    stopping_criteria=criteria,
                )
        request.cached_tokens = self._alone.reused_tokens
        request.encoded_images = sum(image.count_once() for image in images)

    def _search(self, request: Request, inputs: dict[str, Any]) -> None:
        """Answer by beam search, whose tokens are known only at the end. It samples with PyTorch's random state."""
        sampling, config = request.sampling, self._config(request.max_tokens)
        config.num_beams, config.do_sample = sampling.num_beams, not sampling.greedy
        if config.do_sample:
            config.temperature, config.top_p, config.top_k = sampling.temperature, sampling.top_p, 0
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=not sampling.greedy):
            if not sampling.greedy:
                torch.seed() if sampling.seed is None else torch.manual_seed(sampling.seed)
            criteria = StoppingCriteriaList([_Cancelled(request)])
            output = self._alone.generate(**inputs, generation_config=config, stopping_criteria=criteria)
        for token in output[0, inputs["input_ids"].shape[1] :].tolist():
            if request.take(token):
                break

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
    """Passes on each new token, and ends the answer."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Return whether each row has ended, (rows,)."""
        return torch.tensor([self.request.take(int(input_ids[0, -1]))], device=input_ids.device)


class _Cancelled(StoppingCriteria):
    """Ends all rows of a cancelled beam search."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Return whether each row has ended, (rows,)."""
        return torch.full((len(input_ids),), self.request.cancelled, device=input_ids.device)
