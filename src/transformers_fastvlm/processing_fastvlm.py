# SPDX-License-Identifier: Apache-2.0
"""The processor: turns prompts and images into the model's inputs.

A prompt marks each image by one "<image>". The processor replaces it by as many placeholders as the image has tokens,
so `input_ids` has one placeholder for every image feature; the model only checks the counts. In a directory with
Apple's layout, which has no processor files, the processor reads config.json and the tokenizer's files.
"""

import functools
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, BatchFeature, PreTrainedConfig
from transformers.processing_utils import MultiModalData, ProcessorMixin, TextKwargs

from . import compat
from .configuration_fastvlm import FastVLMConfig
from .conversations import (
    DEFAULT_VIDEO_FRAMES,
    RENDERING,
    answer_mask,
    image_sources,
    is_message,
    known_role,
    plain_message,
    render_with_spans,
)
from .image_processing_pil_fastvlm import FastVLMImageProcessorPil
from .images import anyres
from .tokens import HUB_KEYS, IMAGE_TOKEN, TOKENIZER_FILES

__all__ = ["FastVLMProcessor", "chat_template_for"]

_TEMPLATES = {"llama": "vicuna_v1"}


@functools.cache
def chat_template_for(text_model_type: str) -> str:
    """Return FastVLM's chat template for a text model: Vicuna v1 for "llama", ChatML for any other.

    Args:
        text_model_type: `model_type` of the text model's configuration.
    """
    name = _TEMPLATES.get(text_model_type, "chatml")
    return resources.files(__package__).joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


class FastVLMProcessor(ProcessorMixin):
    """Wraps an image processor and a tokenizer, expands "<image>" and renders conversations.

    Loading from a directory in Apple's layout also sets two things that its files lack and generation needs: the text
    model's chat template (the tokenizer's template renders strings only), and padding on the left, since a decoder
    continues each row from its end. Training code that pads on the right passes `padding_side="right"` in the call.
    A directory that this class saved is loaded unchanged.

    The default image processor is the Pillow one, which matches the reference exactly, regardless of what is installed
    or was saved; `from_pretrained(..., backend="torchvision")` chooses the other.

    Args:
        image_processor: `FastVLMImageProcessorPil` or `FastVLMImageProcessor`.
        tokenizer: the text model's tokenizer. If it has no "<image>", this object gets it as a special token; the
            tokenizer is never copied.
        chat_template: Jinja template, or a dictionary of named ones. Default: ChatML if the tokenizer has
            <|im_start|> and <|im_end|>, otherwise none.
        mm_patch_merge_type: how the model merges the tiles of an AnyRes image: "flat", "spatial" or "spatial_unpad".
            Must be the model's.
        context_length: maximum tokens of a row, placeholders included; longer rows raise ValueError. None for no limit.

    Attributes:
        image_token: "<image>".
        image_token_id: its id in this tokenizer.

    Example:
        >>> processor = FastVLMProcessor.from_pretrained("apple/FastVLM-0.5B")  # doctest: +SKIP
        >>> inputs = processor(text="<image>\\nDescribe it.", images=image, return_tensors="pt")  # doctest: +SKIP
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        mm_patch_merge_type: str = "flat",
        context_length: int | None = None,
    ) -> None:
        for name, part in (("image_processor", image_processor), ("tokenizer", tokenizer)):
            if part is None:
                raise ValueError(
                    f"FastVLMProcessor got no {name}: it needs both an image processor and a tokenizer. "
                    "FastVLMProcessor.from_pretrained finds both in a checkpoint."
                )
        if mm_patch_merge_type not in anyres.MERGE_TYPES:
            raise ValueError(f"mm_patch_merge_type is {mm_patch_merge_type!r}; expected one of {anyres.MERGE_TYPES}.")
        self.image_token = IMAGE_TOKEN
        self.image_token_id = _image_token_id(tokenizer)
        self.mm_patch_merge_type = mm_patch_merge_type
        self.context_length = context_length
        if chat_template is None and {"<|im_start|>", "<|im_end|>"} <= tokenizer.added_tokens_encoder.keys():
            chat_template = chat_template_for("qwen2")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    # Loading

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read processor_config.json, or else derive its content from config.json."""
        hub = {key: kwargs[key] for key in HUB_KEYS if kwargs.get(key) is not None}
        processor_dict, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "processor_class" not in processor_dict:
            config = FastVLMConfig.from_pretrained(pretrained_model_name_or_path, **hub)
            text_config = config.get_text_config()
            # A tokenizer's template that never mentions images does not render them.
            if "image" not in str(processor_dict.get("chat_template")):
                processor_dict["chat_template"] = chat_template_for(text_config.model_type)
            processor_dict.setdefault("mm_patch_merge_type", config.mm_patch_merge_type)
            processor_dict.setdefault("context_length", getattr(text_config, "max_position_embeddings", None))
        return processor_dict, kwargs

    @classmethod
    def _get_arguments_from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        processor_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Return the image processor and the tokenizer; either may be passed as a keyword."""
        processor_dict = processor_dict or {}
        backend = kwargs.pop("backend", None)
        kwargs.pop("use_fast", None)
        image_processor, tokenizer = kwargs.pop("image_processor", None), kwargs.pop("tokenizer", None)
        hub = {key: kwargs[key] for key in HUB_KEYS if key in kwargs}
        if image_processor is None:
            image_class = _image_processor_class(backend)
            names = image_class.valid_kwargs.__annotations__
            image_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if key in names and key not in hub}
            image_processor = image_class.from_pretrained(pretrained_model_name_or_path, **hub, **image_kwargs)
        if tokenizer is None:
            for own in ("mm_patch_merge_type", "context_length"):
                kwargs.pop(own, None)
            if "processor_class" not in processor_dict:
                kwargs.setdefault("padding_side", "left")
                kwargs.setdefault("chat_template", processor_dict.get("chat_template"))
            # The tokenizer's files name its class; with a bare configuration AutoTokenizer does not read config.json.
            kwargs["config"] = PreTrainedConfig()
            _check_tokenizer_files(pretrained_model_name_or_path, kwargs.get("subfolder"))
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return [image_processor, tokenizer]

    # Calling

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
        """Check the form of `text` and `images`, read images given by path or URL, wrap a single text in a list."""
        if text is not None and not isinstance(text, str):
            if not isinstance(text, list | tuple) or not text or not all(isinstance(row, str) for row in text):
                raise ValueError(
                    f"text is {_shown(text)}; expected a string or a non-empty list of strings. For a conversation use "
                    "apply_chat_template, for token ids call the model."
                )
        missing = [index for index, image in enumerate(_flat(images)) if image is None]
        if images is not None and missing:
            raise ValueError(
                f"Image {missing[0]} is None. Remove it; for a row without images in a batch pass an empty list."
            )
        images = images if images is not None and _flat(images) else None
        prepared: tuple[Any, Any, Any, Any] = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        return prepared

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Check that every "<image>" has an image, row by row if `images` is nested.

        Raises:
            ValueError: counts differ, no input was given, or video or audio was given.
        """
        if videos is not None or audio is not None:
            raise ValueError(
                f"FastVLM takes text and images, but {'videos' if videos is not None else 'audio'} was given. "
                "Pass frames of a video as images, or put the video into a message for apply_chat_template."
            )
        if text is None and images is None:
            raise ValueError("Neither text nor images were given; pass at least one of them.")
        if text is not None:
            rows = [text] if isinstance(text, str) else text
            self._check_counts([row.count(self.image_token) for row in rows], images)
        super().validate_inputs(images=None if images is None else _flat(images), text=text, **kwargs)

    def _check_counts(self, placeholders: list[int], images: Any) -> None:
        """Compare the number of placeholders of each row with the number of images."""
        by_row = images is not None and _is_nested(images)
        counts = [len(_flat(row)) for row in images] if by_row else [0 if images is None else len(_flat(images))]
        if by_row and len(counts) != len(placeholders):
            raise ValueError(
                f"There are {len(placeholders)} texts, but images has {len(counts)} rows. Pass one list of images for "
                "each text (an empty one for a text without images), or one flat list for all."
            )
        pairs = list(zip(placeholders, counts, strict=True)) if by_row else [(sum(placeholders), counts[0])]
        for row, (expected, given) in enumerate(pairs):
            if expected == given:
                continue
            where = f"Text {row}" if by_row and len(pairs) > 1 else "The text"
            advice = "Write one placeholder for each image and pass the images in the same order."
            if given == 0:
                advice = (
                    "Pass the images in the same order (an image part of a message needs url, path, base64 or image). "
                    f"If {self.image_token} is meant literally, write it differently, such as < image >."
                )
            raise ValueError(f"{where} has {expected} {self.image_token}, but {given} images were given. {advice}")

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        images = _flat(images)
        processed = self.image_processor(images, **kwargs)
        return processed, [self.replace_image_token(processed, index, **kwargs) for index in range(len(images))]

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """Return the placeholders of one image, one per token.

        Args:
            image_inputs: the image processor's output.
            image_idx: index of the image.
            **kwargs: the arguments of the call of the image processor.
        """
        sizes = image_inputs["image_sizes"][image_idx] if "image_sizes" in image_inputs else None
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:] if sizes is None else sizes
        return self.image_token * self._tokens(int(height), int(width), kwargs)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Return the numbers of tokens and tiles of images of the given (height, width), for servers' scheduling."""
        if image_sizes is None:
            return MultiModalData()
        options = {**kwargs.get("images_kwargs", {}), **kwargs}
        count_tiles = self.image_processor.get_number_of_image_patches
        return MultiModalData(
            num_image_tokens=[self._tokens(height, width, options) for height, width in image_sizes],
            num_image_patches=[count_tiles(height, width, options) for height, width in image_sizes],
        )

    def _tokens(self, height: int, width: int, options: dict[str, Any]) -> int:
        number: int = self.image_processor.get_number_of_image_tokens(height, width, self.mm_patch_merge_type, options)
        return number

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        """Check each row of ids: no placeholder was truncated, and the row fits into the context.

        Transformers calls this method after tokenizing.
        """
        marked = "\U000f0000" + self.image_token  # a user's literal text (sanitize_control_tokens)
        placeholders = [row.count(self.image_token) - row.count(marked) for row in text]
        for row, (ids, expected) in enumerate(zip(_as_lists(text_inputs["input_ids"]), placeholders, strict=False)):
            kept = ids.count(self.image_token_id)
            if kept != expected:
                raise ValueError(
                    f"Truncation would leave {kept} of the {expected} image tokens of text {row}, and an image cannot "
                    "be cut. Turn truncation off, raise max_length, or use a smaller image size."
                )
        if self.context_length is None:
            return
        rows = _as_lists(text_inputs.get("attention_mask", text_inputs["input_ids"]))
        lengths = [sum(row) if "attention_mask" in text_inputs else len(row) for row in rows]
        for row, length in enumerate(lengths):
            if length > self.context_length:
                of_images = placeholders[row] if row < len(placeholders) else 0
                raise ValueError(
                    f"Text {row} has {length} tokens, {of_images} of them for images, but the model's context holds "
                    f"{self.context_length}. Shorten the text, pass fewer or smaller images, or truncate with "
                    "truncation=True and max_length=… ."
                )

    # Conversations

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Render a conversation, or a list of them, and with `tokenize=True` process it and its images.

        As in Transformers. A content is a string or a list of parts: `{"type": "text", "text": …}`, `{"type": "image"}`
        with `url`, `path`, `base64` or `image`, OpenAI's `image_url`, and `{"type": "video"}` with `video` (frames),
        `path` or `url`. A video becomes `num_frames` images (default 8, at most 32), spread evenly from first to last
        frame; the model was not trained on videos. Roles are user, assistant and system; developer means system. The
        conversation is not changed.

        With `return_assistant_tokens_mask=True`, `assistant_masks` marks exactly the supervised tokens, on every
        supported version and with images. For conversations of strings, images may also be passed as
        `processor_kwargs={"images": …}`.

        Raises:
            ValueError: no messages, an unknown role or part, no content, a video that cannot be read, too many frames,
                or an error of calling the processor. Roles other than system (or developer), user and assistant need
                a template that supports them.
        """
        if isinstance(conversation, str):
            raise ValueError(
                f"conversation is {_shown(conversation)}; expected a list of messages, such as "
                '[{"role": "user", "content": "…"}]. For a finished prompt call the processor itself: text=….'
            )
        batched = isinstance(conversation, list | tuple) and conversation and not is_message(conversation[0])
        chats = [getattr(chat, "messages", chat) for chat in conversation] if batched else [conversation]
        if not all(chats):
            raise ValueError("A conversation has no messages; expected at least one with a role and a content.")
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        frames = processor_kwargs.pop("num_frames", kwargs.pop("num_frames", DEFAULT_VIDEO_FRAMES))
        chats = [[plain_message(message, frames) for message in chat] for chat in chats]
        if (chat_template or self.chat_template) in (chat_template_for("qwen2"), chat_template_for("llama")):
            chats = [[known_role(message) for message in chat] for chat in chats]
        names = TextKwargs.__annotations__.keys() | self.image_processor.valid_kwargs.__annotations__.keys()
        names -= compat.TEMPLATE_ARGUMENTS
        processor_kwargs |= {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        if not kwargs.get("return_assistant_tokens_mask") or not (kwargs.get("tokenize") and kwargs.get("return_dict")):
            kwargs["processor_kwargs"] = processor_kwargs
            return super().apply_chat_template(chats if batched else chats[0], chat_template, **kwargs)

        for name in ("continue_final_message", "sanitize_control_tokens"):
            if kwargs.pop(name, False):
                raise ValueError(f"return_assistant_tokens_mask and {name} cannot be combined; remove one of them.")
        for name in ("return_assistant_tokens_mask", "tokenize", "return_dict"):
            del kwargs[name]
        if kwargs.get("return_tensors", "auto") != "auto":
            processor_kwargs["return_tensors"] = kwargs["return_tensors"]
        kwargs.pop("return_tensors", None)
        if isinstance(self.chat_template, dict):
            chat_template = self.chat_template.get(chat_template or "default", chat_template)
        return self._with_assistant_masks(chats, chat_template or self.chat_template, processor_kwargs, kwargs)

    def _with_assistant_masks(
        self, chats: list[list[dict[str, Any]]], template: Any, processor_kwargs: dict[str, Any], kwargs: dict[str, Any]
    ) -> BatchFeature:
        """Process conversations and mark the tokens of the template's generation blocks.

        Transformers < 5.19 counts characters of the text before its placeholders are expanded, so it marks the wrong
        tokens if there are images or padding on the right.
        """
        if not isinstance(template, str):
            raise ValueError("This processor has no chat template of that name, so it cannot render a conversation.")
        prompts, spans = render_with_spans(chats, template, **{**self.tokenizer.special_tokens_map, **kwargs})
        bos = self.tokenizer.bos_token
        if bos is not None and prompts[0].startswith(bos):
            processor_kwargs["add_special_tokens"] = False
        sources = [[source for message in chat for source in image_sources(message)] for chat in chats]
        images = processor_kwargs.pop("images", None) or sources
        if _flat(images):
            images = self.image_processor.fetch_images(images)  # decoding is slow and needs no lock
        with RENDERING:
            inputs: BatchFeature = self(
                text=prompts,
                images=images,
                **processor_kwargs,
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
            )
        offsets = _as_lists(inputs.pop("offset_mapping"))
        replaced = inputs.pop("text_replacement_offsets", None) or [[] for _ in prompts]
        inputs["assistant_masks"] = [answer_mask(*row) for row in zip(offsets, replaced, spans, strict=True)]
        return inputs.convert_to_tensors(tensor_type=processor_kwargs.get("return_tensors"))


def _check_tokenizer_files(directory: str | os.PathLike[str], subfolder: str | None) -> None:
    """Raise OSError for a directory without a tokenizer, as a model's `save_pretrained` alone creates it."""
    folder = Path(directory, subfolder or "")
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise OSError(
            f"{folder} has no tokenizer files ({', '.join(TOKENIZER_FILES[:3])}). Save the processor there too: "
            f"processor.save_pretrained({str(folder)!r}); or pass processing_class=processor to Trainer."
        )


def _image_token_id(tokenizer: Any) -> int:
    """Return the id of "<image>" in `tokenizer`; add the token if it is missing."""
    if IMAGE_TOKEN not in tokenizer.added_tokens_encoder:
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return token_id


def _image_processor_class(backend: str | None) -> Any:
    if backend in (None, "pil"):
        return FastVLMImageProcessorPil
    if backend != "torchvision":
        raise ValueError(f"backend is {backend!r}; expected 'pil' (the default, exact) or 'torchvision'.")
    from .image_processing_fastvlm import FastVLMImageProcessor

    return FastVLMImageProcessor


def _is_nested(images: Any) -> bool:
    """Whether `images` has one list for each text."""
    return isinstance(images, list | tuple) and bool(images) and all(isinstance(row, list | tuple) for row in images)


def _flat(images: Any) -> list[Any]:
    """Return single images in order, from one image, a batch in one array, or lists of either."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [image for row in images for image in (_flat(row) if row is not None else [None])]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _as_lists(rows: Any) -> list[Any]:
    rows = rows.tolist() if hasattr(rows, "tolist") else rows
    return [row.tolist() if hasattr(row, "tolist") else row for row in rows]


def _shown(value: Any) -> str:
    text = f"{value!r} ({type(value).__name__})"
    return text if len(text) <= 120 else f"{text[:100]}… ({type(value).__name__})"
