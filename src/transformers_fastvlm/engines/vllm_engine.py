# SPDX-License-Identifier: Apache-2.0
"""The engine over vLLM: continuous batching, in a process of its own."""

import os
from collections.abc import Sequence
from typing import Any, Literal

from transformers import AutoConfig, AutoProcessor

from ..checkpoints.embedded import resolve_model
from ..vllm_plugin import END_WITH_PARENT
from .base import Answer, Conversation, Sampling
from .model_loading import check_dtype, image_options
from .prompts import check_sampling, read_prompts

__all__ = ["VllmEngine"]

_GIB = 1 << 30
_CPU_CACHE_GIB = 2.0
_FINISH_REASONS: dict[str, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}


class VllmEngine:
    """A FastVLM that answers conversations with vLLM.

    vLLM batches what it is given by itself, so pass many conversations at once. It runs in a process that is started
    here: a script needs the guard `if __name__ == "__main__":`. `close()` ends that process, as does the end of this
    one, however it comes. vLLM's own messages below warnings are left out, warnings go to the standard error output,
    and it reports no usage to its makers; the environment variables VLLM_LOGGING_LEVEL, VLLM_LOGGING_STREAM and
    VLLM_NO_USAGE_STATS say otherwise.

    Args:
        model, dtype, size: as `TransformersEngine` takes them.
        device: "auto" alone: a build of vLLM has one kind of device.
        batch_size: most conversations that run together; None for vLLM's own limit.
        max_images: most pictures of a conversation, at least 1.
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
        >>> engine.generate(conversations, Sampling())  # doctest: +SKIP
    """

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
        pictures = image_options(config, size)
        self.processor: Any = AutoProcessor.from_pretrained(model, **pictures)
        self._max_images = max_images
        options: dict[str, Any] = {"dtype": dtype, "limit_mm_per_prompt": {"image": max_images}}
        if pictures:
            options["mm_processor_kwargs"] = pictures
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
        self._context: int = self.llm.llm_engine.model_config.max_model_len

    def generate(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Answer]:
        """Answer each conversation, in their order.

        All of them are checked, and their pictures decoded, before the model runs.

        Raises:
            ValueError: a conversation has an image without a place, a place without an image, too many images, an
                image that cannot be used, or fills the model's context; or an option of `sampling` is out of range.
                None is answered then.
        """
        from vllm import SamplingParams

        check_sampling(sampling)
        prompts = [
            {
                "prompt_token_ids": prompt.ids,
                **({"multi_modal_data": {"image": prompt.images}} if prompt.images else {}),
            }
            for prompt in read_prompts(self.processor, conversations, self._context, self._max_images)
        ]
        if not prompts:
            return []
        params = SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(sampling.stop),
        )
        return [_answer(output) for output in self.llm.generate(prompts, params, use_tqdm=False)]

    def close(self) -> None:
        """End vLLM's processes and give back their memory; the engine cannot be used after that."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm.llm_engine.renderer.shutdown()
        self.llm = self.processor = None


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


def _answer(output: Any) -> Answer:
    """Return vLLM's output of one conversation in our form."""
    completion = output.outputs[0]
    reason = _FINISH_REASONS.get(str(completion.finish_reason))
    if reason is None:
        raise RuntimeError(f"vLLM ended an answer for the reason {completion.finish_reason!r}; its log says why.")
    return Answer(
        text=completion.text.strip(),
        finish_reason=reason,
        prompt_tokens=len(output.prompt_token_ids),
        completion_tokens=len(completion.token_ids),
    )
