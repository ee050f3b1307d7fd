# SPDX-License-Identifier: Apache-2.0
"""The engine over Transformers: one process, batches of similar length, padded on the left."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .._image_inputs import load_pixels, pil_to_rgb
from ..tokens import IMAGE_TOKEN
from .base import Answer, Conversation, Sampling

__all__ = ["TransformersEngine"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")
# Pillow converts these to RGB whatever they hold.
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class _Prompt:
    """A conversation that was checked: its rendered text, its pictures, and the tokens of both together."""

    text: str
    images: list[Image.Image]
    tokens: int


class TransformersEngine:
    """A FastVLM that answers conversations with Transformers' `generate`.

    The model runs on rows of similar length together, each padded on the left to the longest. What a row is answered
    does not depend on the others, but for sums in another order: in half precision two tokens of nearly the same score
    may change places. An engine serves one thread at a time.

    Args:
        model: directory or hub repository.
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
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
        self.batch_size = batch_size
        place = _device(device)
        options = _image_options(AutoConfig.from_pretrained(model), size)
        self.processor: Any = AutoProcessor.from_pretrained(model, **options)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            model, dtype="auto" if dtype == "auto" else getattr(torch, dtype)
        )
        if dtype == "auto" and place.type == "cpu" and loaded.dtype == torch.float16:
            loaded = loaded.float()
        self.model: Any = loaded.to(place).eval()
        if self.model.config.image_token_id != self.processor.image_token_id:
            raise ValueError(
                f"{model!r}: config.json has image_token_id {self.model.config.image_token_id}, but {IMAGE_TOKEN} is "
                f"{self.processor.image_token_id} in the tokenizer. The files belong to different checkpoints."
            )

    def generate(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Answer]:
        """Answer each conversation, in their order.

        All of them are checked, and their pictures decoded, before the model runs.

        Raises:
            ValueError: a conversation has an image without a place, a place without an image, an image that cannot be
                used, or fills the model's context; or an option of `sampling` is out of range. None is answered then.
        """
        _check(sampling)
        prompts = []
        for index, conversation in enumerate(conversations):
            try:
                prompts.append(self._checked(conversation))
            except ValueError as error:
                where = f"Conversation {index}: " if len(conversations) > 1 else ""
                raise ValueError(f"{where}{error}") from error
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

    # Before the model runs

    def _checked(self, conversation: Conversation) -> _Prompt:
        """Render a conversation, decode its pictures and count its tokens, or raise ValueError."""
        images = [image for message in conversation for image in _pictures(message)]
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        places = text.count(IMAGE_TOKEN)
        if places != len(images):
            raise ValueError(
                f"the text has {places} places for images ({IMAGE_TOKEN}), but there are {len(images)} images. If "
                f"{IMAGE_TOKEN} is meant literally, write it otherwise, such as < image >."
            )
        tokens = self._count(text, images)
        context = self.processor.context_length
        if context is not None and tokens >= context:
            raise ValueError(
                f"the conversation has {tokens} tokens and fills the model's context of {context}, with no room for "
                "an answer. Shorten it, or use fewer or smaller pictures."
            )
        return _Prompt(text, images, tokens)

    def _count(self, text: str, images: list[Image.Image]) -> int:
        """Return the tokens of a rendered prompt, each place counted as its image's tokens."""
        ids = self.processor.tokenizer(text, **self._special_tokens([text]))["input_ids"]
        found = self.processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
        return len(ids) - len(images) + sum(found.num_image_tokens or [])

    def _special_tokens(self, texts: list[str]) -> dict[str, bool]:
        """Return the tokenizer's option that keeps it from a second token of the beginning."""
        bos = self.processor.tokenizer.bos_token
        return {"add_special_tokens": False} if bos is not None and texts[0].startswith(bos) else {}

    def _set_options(self, sampling: Sampling) -> None:
        """Set how tokens are chosen.

        On the model: generate() takes a None as "not given", and falls back to the checkpoint's temperature.
        """
        config = self.model.generation_config
        config.do_sample = sampling.temperature > 0
        config.temperature = sampling.temperature if config.do_sample else None
        config.top_p = sampling.top_p if config.do_sample else None
        config.top_k = 0 if config.do_sample else None

    # The model

    def _answers(self, prompts: list[_Prompt], sampling: Sampling) -> Iterator[Answer]:
        texts = [prompt.text for prompt in prompts]
        images = [prompt.images for prompt in prompts]
        inputs = self.processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **self._special_tokens(texts),
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


def _check(sampling: Sampling) -> None:
    """Raise ValueError for an option out of its range."""
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {sampling.max_new_tokens}; expected 1 or more.")
    if sampling.temperature < 0:
        raise ValueError(f"temperature is {sampling.temperature}; expected 0 (greedy) or more.")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}; expected above 0 and up to 1.")
    if "" in sampling.stop:
        raise ValueError("stop holds an empty text, at which every answer would end; expected texts of one or more.")


def _pictures(message: dict[str, Any]) -> Iterator[Image.Image]:
    """Yield the pictures of a message, decoded, of which nothing can turn out unusable later.

    Raises:
        ValueError: one is damaged, too large, or of a mode whose values do not fit into 8 bits; or a part is neither
            text nor an opened picture. Names and addresses are for whoever calls to open, by rules of its own.
    """
    content = message.get("content")
    for part in content if isinstance(content, list) else []:
        if part.get("type") == "text":
            continue
        picture = part.get("image") if part.get("type") == "image" else None
        if not isinstance(picture, Image.Image):
            raise ValueError(
                f"a part of a message is {str(part)[:80]!r}; expected type text with text, or type image with a Pillow "
                "image."
            )
        load_pixels(picture)
        if picture.mode not in _PLAIN_MODES:
            pil_to_rgb(picture)
        yield picture


def _device(name: str) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    expected = "Expected auto, cpu, cuda (or cuda:1 and so on) or mps."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, which torch does not know. {expected}") from error
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"device is {name!r}, which is not available here (torch {torch.__version__}). {expected}"
        ) from error
    return device


def _image_options(config: Any, size: int | None) -> dict[str, Any]:
    """Return the image processor's options for another size; AnyRes' grids scale with it, as the model expects."""
    if size is None:
        return {}
    options: dict[str, Any] = {"size": {"height": size, "width": size}}
    if config.image_aspect_ratio == "anyres":
        own = config.vision_config.image_size
        options["image_grid_pinpoints"] = [
            [width * size // own, height * size // own] for width, height in config.image_grid_pinpoints
        ]
    return options
