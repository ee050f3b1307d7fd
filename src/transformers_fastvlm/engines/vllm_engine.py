# SPDX-License-Identifier: Apache-2.0
"""The engine over vLLM: continuous batching in a separate process."""

import itertools
import os
from typing import Any

from transformers import AutoConfig, AutoProcessor, GenerationConfig

from ..checkpoints.embedded import resolve_model
from ..vllm_plugin import END_WITH_PARENT
from .answer_schema import Schema
from .base import end_tokens
from .engine import Engine
from .model_loading import check_dtype, image_options
from .request import Request

__all__ = ["VllmEngine"]

_GIB = 1 << 30
_CPU_CACHE_GIB = 2.0


class VllmEngine(Engine):
    """An `Engine` on vLLM.

    vLLM batches requests continuously: a request can start and end at any token. So pass many conversations at once.
    vLLM runs in a new process, so a script needs the guard `if __name__ == "__main__":`. That process ends with
    `close()`, or when this process ends, even if it is killed. By default, vLLM logs only warnings and errors, to
    standard error, and does not report usage statistics; set the environment variables VLLM_LOGGING_LEVEL,
    VLLM_LOGGING_STREAM and VLLM_NO_USAGE_STATS to change this.

    Args:
        model, dtype, size: see `TransformersEngine`.
        device: only "auto": a build of vLLM supports one kind of device.
        batch_size: maximum number of conversations in a batch; None for vLLM's limit.
        max_images: maximum number of images in a conversation, at least 1.
        max_model_len: maximum tokens of a conversation with its images and the answer; None for the checkpoint's.
        cache_gib: GiB of memory for keys and values; None for 2 on a CPU, and for the free memory on a GPU. It must
            hold at least one conversation of `max_model_len`.
        **engine_options: further arguments of `vllm.LLM`, such as `tensor_parallel_size`. On a CPU `enforce_eager` is
            True by default, which starts sooner and needs no compiler.

    Attributes:
        llm: the `vllm.LLM`.
        processor: the checkpoint's `FastVLMProcessor`.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an invalid option, or one that vLLM refuses.
        OSError: there is no such checkpoint, or its files are damaged.

    Example:
        >>> engine = VllmEngine("apple/FastVLM-0.5B", max_images=1)  # doctest: +SKIP
        >>> engine.generate(conversations)  # doctest: +SKIP
    """

    _NAME = "vllm"

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        size: int | None = None,
        batch_size: int | None = None,
        max_images: int = 8,
        max_model_len: int | None = None,
        cache_gib: float | None = None,
        **engine_options: Any,
    ) -> None:
        check_dtype(dtype)
        if device != "auto":
            raise ValueError(f"device is {device!r}; expected 'auto': the device is the one that vLLM was built for.")
        for name, value in (("batch_size", batch_size), ("max_images", max_images), ("max_model_len", max_model_len)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more.")
        if cache_gib is not None and cache_gib <= 0:
            raise ValueError(f"cache_gib is {cache_gib}; expected a number of GiB above 0.")
        llm_class, on_cpu = _import_vllm()
        model = resolve_model(model)
        config = AutoConfig.from_pretrained(model)
        if dtype == "auto":
            own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
            dtype = "float32" if on_cpu and own == "float16" else own
        images = image_options(config, size)
        super().__init__(AutoProcessor.from_pretrained(model, **images), None, max_images)
        self._end_tokens = _end_tokens(model, config)
        options: dict[str, Any] = {"dtype": dtype, "limit_mm_per_prompt": {"image": max_images}}
        # The library that the other engines use, so that all support the same schemas.
        options["structured_outputs_config"] = {"backend": "guidance", "disable_any_whitespace": True}
        if images:
            options["mm_processor_kwargs"] = images
        if batch_size is not None:
            options["max_num_seqs"] = batch_size
        if max_model_len is not None:
            options["max_model_len"] = max_model_len
        if on_cpu:
            options["enforce_eager"] = True
            cache_gib = _CPU_CACHE_GIB if cache_gib is None else cache_gib
        if cache_gib is not None:
            options["kv_cache_memory_bytes"] = int(cache_gib * _GIB)
        self.llm: Any = llm_class(model=model, **{**options, **engine_options})
        self._on_cpu = on_cpu
        self._context: int = self.llm.llm_engine.model_config.max_model_len

    @property
    def context(self) -> int:
        """Maximum tokens of a conversation and its answer."""
        return self._context

    @property
    def device(self) -> str:
        """Device of this build of vLLM."""
        return "cpu" if self._on_cpu else "cuda"

    @property
    def dtype(self) -> str:
        """dtype of the model."""
        return str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def close(self) -> None:
        """Answer the queued requests and end vLLM's processes; the engine cannot be used afterwards."""
        super().close()
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm.llm_engine.renderer.shutdown()
        self.llm = self.processor = None

    def _ends(self) -> set[int]:
        return self._end_tokens

    def _vocabulary(self) -> int:
        return int(self.llm.llm_engine.model_config.get_vocab_size())

    def _work(self) -> None:
        running: dict[str, Request] = {}
        names = map(str, itertools.count())
        try:
            while self._admit(running, names):
                if self.llm.llm_engine.has_unfinished_requests():
                    for output in self.llm.llm_engine.step():
                        self._pass_on(output, running)
                self._drop(running)
        finally:
            for request in running.values():
                request.end(RuntimeError("vLLM has ended"))

    def _admit(self, running: dict[str, Request], names: "map[str]") -> bool:
        """Wait for requests and pass them to vLLM; return False at the end."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        with self._news:
            while not self._queue and not running and not self._closed:
                self._news.wait()
            new = list(self._queue)
            self._queue.clear()
        for request in new:
            prompt: dict[str, Any] = {"prompt_token_ids": request.prompt.ids}
            if request.prompt.images:
                prompt["multi_modal_data"] = {"image": request.prompt.images}
            chosen = request.sampling
            params = SamplingParams(
                max_tokens=request.max_tokens,
                temperature=0.0 if chosen.greedy else chosen.temperature,
                top_p=chosen.top_p,
                seed=None if chosen.seed is None else chosen.seed % 2**63,
                logit_bias=dict(chosen.logit_bias) or None,
                presence_penalty=chosen.presence_penalty,
                frequency_penalty=chosen.frequency_penalty,
                logprobs=chosen.logprobs,
                structured_outputs=None if chosen.schema is None else _structured(chosen.schema),
                output_kind=RequestOutputKind.DELTA,
            )
            request.start()
            try:
                (rendered,) = self.llm.llm_engine.renderer.render_cmpl([prompt])
                name = next(names)
                self.llm.llm_engine.add_request(name, rendered, params)
            except Exception as error:  # vLLM refuses this request; the others continue
                request.end(error)
            else:
                running[name] = request
        return bool(running or self._queue or not self._closed)

    def _pass_on(self, output: Any, running: dict[str, Request]) -> None:
        request = running.get(output.request_id)
        if request is None:
            return
        completion = output.outputs[0]
        ended = False
        for place, token in enumerate(completion.token_ids):
            if completion.logprobs:
                ranked = sorted(completion.logprobs[place].items(), key=lambda one: one[1].rank)
                others = [(other, found.logprob) for other, found in ranked[: request.sampling.logprobs]]
                request.note_logprob(token, completion.logprobs[place][token].logprob, others)
            ended = request.take(token)
            if ended:
                break
        if not ended and not output.finished:
            return
        del running[output.request_id]
        if not output.finished:
            self.llm.llm_engine.abort_request([output.request_id])
        reason = completion.finish_reason
        if output.finished and not ended and reason not in ("stop", "length"):
            request.end(RuntimeError(f"vLLM ended an answer with finish reason {reason!r}; see its log."))
        else:
            request.end(reason="stop" if reason == "stop" else "length")
        self._measure(request)

    def _drop(self, running: dict[str, Request]) -> None:
        gone = [name for name, request in running.items() if request.cancelled]
        if gone:
            self.llm.llm_engine.abort_request(gone)
        for name in gone:
            running.pop(name).end()


def _structured(schema: Schema) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if schema.kind == "json":
        return StructuredOutputsParams(json=schema.text)
    if schema.kind == "regex":
        return StructuredOutputsParams(regex=schema.text)
    return StructuredOutputsParams(choice=schema.value)


def _import_vllm() -> tuple[Any, bool]:
    """Return the class `vllm.LLM`, and whether this build of vLLM is for CPUs."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault(END_WITH_PARENT, "1")
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ImportError(
            "The engine vllm needs vLLM in the same environment: pip install vllm. For a CPU, see docs/vllm.md of "
            "transformers-fastvlm."
        ) from error
    return LLM, current_platform.is_cpu()


def _end_tokens(model: str, config: Any) -> set[int]:
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = None
    ends = config.get_text_config().eos_token_id if ends is None else ends
    return end_tokens(ends)
