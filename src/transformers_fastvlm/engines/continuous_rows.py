# SPDX-License-Identifier: Apache-2.0
"""Requests that join and leave at any token, on the paged cache and the scheduler of Transformers."""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .. import compat
from ..generation_fastvlm import NeverThePlaceholder, check_scores
from ..inference.image_table import ImageTable
from .request import Request
from .row_sampling import RowChooser, choose_tokens

__all__ = ["ContinuousRows"]

PAGE_TOKENS = 16
"""Tokens of a page of the cache. Prompts share a common beginning page by page."""

STEP_TOKENS = 512
"""Maximum tokens of a step. A longer prompt takes several steps, between which the other rows get their tokens."""


class ContinuousRows:
    """The running requests of a model, each a row that gets its next token in each step.

    Transformers' scheduler and paged cache do the work, but not its manager's thread: the model runs in the caller's
    thread only. Prompts that begin with the same tokens and images share the pages of this beginning, also with rows
    that have left.

    Args:
        model: a `FastVLMForConditionalGeneration`.
        images: its images.
        config: generation configuration; has the logits processors that `Sampling` lacks.
        rows: maximum number of rows.
        tokens: capacity of the cache in tokens; halved as long as the device's memory is too small.

    Attributes:
        tokens: as above.

    Raises:
        torch.OutOfMemoryError: the device has no memory for a cache.
    """

    def __init__(self, model: Any, images: ImageTable, config: GenerationConfig, *, rows: int, tokens: int) -> None:
        self.model, self.images, self.config, self.rows = model, images, config, rows
        self.tokens = max(tokens // PAGE_TOKENS, 1) * PAGE_TOKENS
        self._numbers = itertools.count()
        self._running: dict[str, _Row] = {}
        self._forward = _WithImages(model, images)
        # In a list that is emptied before the interpreter ends: the processor's destructor needs PyTorch.
        self._parts: list[Any] = []
        weakref.finalize(self, self._parts.clear)
        self._open()

    @property
    def running(self) -> list[Request]:
        """Requests that have a row."""
        return [row.request for row in self._running.values()]

    @property
    def full(self) -> bool:
        """Whether every row is taken."""
        return len(self._running) == self.rows

    @property
    def stale(self) -> bool:
        """Whether the cache may hold another image under the ids of a new one; `clear` drops it."""
        return self._round != self.images.rounds

    def add(self, request: Request) -> None:
        """Give a request a row; its images must be encoded."""
        name = str(next(self._numbers))
        request.cached_tokens = request.prompt.tokens  # the steps subtract what they compute
        self._running[name] = _Row(request)
        if self._own_processors:
            self._running[name].process_by(self.model, self.config)
        manager, _ = self._parts
        manager.add_request(request.prompt.inputs["ids"], request_id=name, max_new_tokens=None, eos_token_id=-1)

    def remove(self, request: Request) -> None:
        """Take a request's row away; its pages are free in the next step."""
        (name,) = (name for name, row in self._running.items() if row.request is request)
        del self._running[name]
        manager, processor = self._parts
        manager.cancel_request(name)
        # A full cache blocks new rows until one ends, which the scheduler does not take a cancelled one for.
        processor.scheduler.block_new_requests = False

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Run one step of the model. Each row whose prompt is complete gets its next token.

        Returns:
            The requests that have ended or failed. They have no row any more.

        Raises:
            Exception: the step failed, and with it all rows: call `clear`.
        """
        _, processor = self._parts
        if not processor.prepare_next_batch():
            raise RuntimeError(f"the cache of {self.tokens} tokens is full: none of {len(self._running)} rows fits.")
        states = processor.inputs_and_outputs.requests_in_batch
        for one in states:
            request = self._running[one.state.request_id].request
            if not request.tokens:
                request.cached_tokens -= one.query_length
        self._choose.begin([self._running[one.state.request_id] for one in states if one.has_new_token])
        processor._generation_step(self._forward)
        processor.update_batch()
        for request in self._choose.ended:
            self.remove(request)
        return self._choose.ended

    def clear(self) -> list[Request]:
        """Take all rows away and drop the cache; return the requests that had a row."""
        left = self.running
        self.close()
        self._open()
        return left

    def close(self) -> None:
        """Free the memory."""
        self._running.clear()
        self._parts.clear()

    def _open(self) -> None:
        self._round = self.images.rounds
        processors = self.model._get_logits_processor(self.config)
        shared = [one for one in processors if isinstance(one, NeverThePlaceholder)]
        self._own_processors = len(shared) < len(processors)
        self._choose = _Choose()
        while True:
            try:
                self._parts += compat.open_pages(
                    self.model,
                    LogitsProcessorList([*shared, self._choose]),
                    page_tokens=PAGE_TOKENS,
                    num_blocks=self.tokens // PAGE_TOKENS,
                    max_batch_tokens=min(STEP_TOKENS, self.tokens),
                    max_requests_per_batch=self.rows,
                )
                return
            except torch.OutOfMemoryError:
                if self.tokens <= STEP_TOKENS:
                    raise
                self.tokens = self.tokens // 2 // PAGE_TOKENS * PAGE_TOKENS


class _WithImages:
    """The model for Transformers' continuous batching, whose token ids include those of images."""

    def __init__(self, model: Any, images: ImageTable) -> None:
        self.model, self.images = model, images

    def _supports_logits_to_keep(self) -> bool:
        return True

    def __call__(self, input_ids: Tensor, **inputs: Any) -> Any:
        embeds = self.images.embed(input_ids, self.model.get_input_embeddings())
        return self.model(inputs_embeds=embeds, **inputs)


class _Row:
    """A request with a row.

    Attributes:
        request: as above.
        tokens: its tokens, prompt included, if processors need them.
        processors: those of the generation configuration that depend on the row's tokens, such as a repetition penalty.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.processors: LogitsProcessorList | None = None

    def process_by(self, model: Any, config: GenerationConfig) -> None:
        """Make the processors of a generation configuration for this row."""
        self.tokens = self.request.prompt.expanded()
        self.processors = model._get_logits_processor(config, input_ids_seq_length=len(self.tokens))

    def process(self, scores: Tensor) -> Tensor:
        """Return the row's processed scores (1, vocabulary)."""
        if self.processors is None:
            return scores
        processed: Tensor = self.processors(torch.tensor([self.tokens], device=scores.device), scores)
        return processed


class _Choose(LogitsProcessor):
    """Chooses the next token of each row, and passes it on to the row's request.

    Attributes:
        ended: requests that ended or failed in this step.
    """

    supports_continuous_batching = True

    def __init__(self) -> None:
        self._rows: list[_Row] = []
        self.ended: list[Request] = []

    def begin(self, rows: list[_Row]) -> None:
        """Begin a step, in which these rows get a token, in this order."""
        self._rows, self.ended = rows, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows, vocabulary) with the maximum at the chosen tokens.

        There may be more rows, of prompts that are not complete yet; their tokens are not used.
        """
        own = scores[: len(self._rows)]
        if any(row.processors is not None for row in self._rows):
            own = torch.cat([row.process(one) for row, one in zip(self._rows, own.split(1), strict=True)])
        if not all(row.request.tokens for row in self._rows):
            check_scores(own[:, None])  # of all rows: attention spreads NaN from one row to the others
        tokens = choose_tokens([_chooser(row.request) for row in self._rows], own)
        for row, token in zip(self._rows, tokens, strict=True):
            row.tokens.append(token)
            if row.request.take(token):
                self.ended.append(row.request)
        chosen = torch.tensor(tokens, dtype=torch.long, device=scores.device)[:, None]
        return torch.cat([own.scatter(-1, chosen, torch.inf), scores[len(tokens) :]])


def _chooser(request: Request) -> RowChooser:
    if request.chooser is None:
        raise RuntimeError("a request has no token chooser.")
    return request.chooser
