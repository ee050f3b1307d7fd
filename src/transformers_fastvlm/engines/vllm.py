# SPDX-License-Identifier: Apache-2.0
"""The engine over vLLM: continuous batching, in a process of its own."""

import os
from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image
from transformers import AutoConfig, AutoProcessor

from ..tokens import IMAGE_TOKEN
from .base import Answer, Conversation, Sampling
from .transformers import _check, _image_options, _pictures

__all__ = ["VllmEngine"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_GIB = 1 << 30
_CPU_CACHE_GIB = 2.0
_FINISH_REASONS: dict[str, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}


class VllmEngine:
    """A FastVLM that answers conversations with vLLM.

    vLLM batches what it is given by itself, so pass many conversations at once. It runs in a process that is started
    here: a script needs the guard `if __name__ == "__main__":`, and `close()` ends that process. vLLM's own messages
    below warnings are left out, warnings go to the standard error output, and it reports no usage to its makers;
    the environment variables VLLM_LOGGING_LEVEL, VLLM_LOGGING_STREAM and VLLM_NO_USAGE_STATS say otherwise.

    Args:
        model: directory or hub repository.
        dtype: "auto" is the checkpoint's own, but float32 where that is float16 and the device a CPU; or "float32",
            "bfloat16", "float16".
        device: "auto" alone: a build of vLLM has one kind of device.
        size: height and width, in pixels, that pictures are resized to, a multiple of 64; None for the checkpoint's.
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
        >>> engine = VllmEngine("apple/FastVLM-0.5B")  # doctest: +SKIP
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
        batch_size: int | None = None,
        max_images: int = 8,
        max_model_len: int | None = None,
        cache_gib: float | None = None,
        **engine_options: Any,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}.")
        if device != "auto":
            raise ValueError(f"device is {device!r}; expected 'auto': the device is the one that vLLM was built for.")
        for name, value in (("batch_size", batch_size), ("max_images", max_images), ("max_model_len", max_model_len)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more.")
        if cache_gib is not None and cache_gib <= 0:
            raise ValueError(f"cache_gib is {cache_gib}; expected a number of GiB above 0.")
        llm_class, on_cpu = _import_vllm()
        config = AutoConfig.from_pretrained(model)
        if dtype == "auto":
            own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
            dtype = "float32" if on_cpu and own == "float16" else own
        image_options = _image_options(config, size)
        self.processor: Any = AutoProcessor.from_pretrained(model, **image_options)
        self._max_images = max_images
        options: dict[str, Any] = {"dtype": dtype, "limit_mm_per_prompt": {"image": max_images}}
        if image_options:
            options["mm_processor_kwargs"] = image_options
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

        _check(sampling)
        prompts = []
        for index, conversation in enumerate(conversations):
            try:
                prompts.append(self._prompt(conversation))
            except ValueError as error:
                where = f"Conversation {index}: " if len(conversations) > 1 else ""
                raise ValueError(f"{where}{error}") from error
        if not prompts:
            return []
        params = SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
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

    def _prompt(self, conversation: Conversation) -> dict[str, Any]:
        """Return a conversation as vLLM takes it: token ids with one placeholder a picture, and the pictures."""
        images: list[Image.Image] = [image for message in conversation for image in _pictures(message)]
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        places = text.count(IMAGE_TOKEN)
        if places != len(images):
            raise ValueError(
                f"the text has {places} places for images ({IMAGE_TOKEN}), but there are {len(images)} images. If "
                f"{IMAGE_TOKEN} is meant literally, write it otherwise, such as < image >."
            )
        if len(images) > self._max_images:
            raise ValueError(
                f"the conversation has {len(images)} images, but this engine takes {self._max_images}. Load it with a "
                "larger max_images."
            )
        tokenizer = self.processor.tokenizer
        starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not starts)["input_ids"]
        found = self.processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
        tokens = len(ids) - len(images) + sum(found.num_image_tokens or [])
        if tokens >= self._context:
            raise ValueError(
                f"the conversation has {tokens} tokens and fills the context of {self._context}, with no room for an "
                "answer. Shorten it, or use fewer or smaller pictures."
            )
        return {"prompt_token_ids": ids, **({"multi_modal_data": {"image": images}} if images else {})}


def _import_vllm() -> tuple[Any, bool]:
    """Return vLLM's class, and whether this build of vLLM computes on a CPU."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
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
