# SPDX-License-Identifier: Apache-2.0
"""The engine over vLLM: continuous batching, in a process of its own."""

import itertools
import os
from typing import Any

from transformers import AutoConfig, AutoProcessor, GenerationConfig

from ..checkpoints.embedded import resolve_model
from ..vllm_plugin import END_WITH_PARENT
from .base import end_tokens
from .engine import Engine
from .model_loading import check_dtype, image_options
from .request import Request

__all__ = ["VllmEngine"]

_GIB = 1 << 30
_CPU_CACHE_GIB = 2.0


class VllmEngine(Engine):
    """An `Engine` on vLLM.

    vLLM batches what it is given by itself: requests join and leave at any token, and texts come as they are made. So
    pass many conversations at once. It runs in a process that is started
    here: a script needs the guard `if __name__ == "__main__":`. `close()` ends that process, as does the end of this
    one, however it comes. vLLM's own messages below warnings are left out, warnings go to the standard error output,
    and it reports no usage to its makers; the environment variables VLLM_LOGGING_LEVEL, VLLM_LOGGING_STREAM and
    VLLM_NO_USAGE_STATS say otherwise.

    Args:
        model, dtype, size: as `TransformersEngine` takes them.
        device: "auto" alone: a build of vLLM has one kind of device.
        batch_size: most conversations that run together; None for vLLM's own limit.
        max_images: most images of a conversation, at least 1.
        max_model_len: most tokens of a conversation with its pictures and the answer; None for the checkpoint's.
        cache_gib: GiB of memory for keys and values; None for 2 on a CPU, and on a GPU what vLLM finds free. It must
            hold at least one conversation of `max_model_len`.
        **engine_options: further arguments of `vllm.LLM`, such as `tensor_parallel_size`. On a CPU `enforce_eager` is
            True by default, which starts sooner and needs no compiler.

    Attributes:
        llm: the `vllm.LLM`.
        processor: the checkpoint's `FastVLMProcessor`.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an option that is none of these, or that vLLM refuses.
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
        """Most tokens of a conversation and its answer."""
        return self._context

    @property
    def device(self) -> str:
        """What this build of vLLM computes on."""
        return "cpu" if self._on_cpu else "cuda"

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        return str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def close(self) -> None:
        """Answer what is queued, end vLLM's processes and give back their memory; no engine is left after that."""
        super().close()
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm.llm_engine.renderer.shutdown()
        self.llm = self.processor = None

    def _ends(self) -> set[int]:
        return self._end_tokens

    def _goes_with(self, requests: list[Request], other: Request) -> bool:
        return True

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
        """Give vLLM what waits; return whether there is anything to do, having waited for it."""
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
                max_tokens=request.room,
                temperature=0.0 if chosen.greedy else chosen.temperature,
                top_p=chosen.top_p,
                seed=None if chosen.seed is None else chosen.seed % 2**63,
                output_kind=RequestOutputKind.DELTA,
            )
            request.start()
            try:
                (rendered,) = self.llm.llm_engine.renderer.render_cmpl([prompt])
                name = next(names)
                self.llm.llm_engine.add_request(name, rendered, params)
            except Exception as error:  # one that vLLM refuses; others go on
                request.end(error)
            else:
                running[name] = request
        return bool(running or self._queue or not self._closed)

    def _pass_on(self, output: Any, running: dict[str, Request]) -> None:
        request = running.get(output.request_id)
        if request is None:
            return
        completion = output.outputs[0]
        ended = any(request.take(token) for token in completion.token_ids)
        if not ended and not output.finished:
            return
        del running[output.request_id]
        if not output.finished:
            self.llm.llm_engine.abort_request([output.request_id])
        reason = completion.finish_reason
        if output.finished and not ended and reason not in ("stop", "length"):
            request.end(RuntimeError(f"vLLM ended an answer for the reason {reason!r}; its log says why."))
        else:
            request.end(reason="stop" if reason == "stop" else "length")
        self._measure(request)

    def _drop(self, running: dict[str, Request]) -> None:
        gone = [name for name, request in running.items() if request.cancelled]
        if gone:
            self.llm.llm_engine.abort_request(gone)
        for name in gone:
            running.pop(name).end()


def _import_vllm() -> tuple[Any, bool]:
    """Return vLLM's class, and whether this build of vLLM computes on a CPU."""
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
