# SPDX-License-Identifier: Apache-2.0
"""New models: an encoder and a language model joined by an untrained projector."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from .. import (
    FastViTHDConfig,
    FastViTHDModel,
    FastVLMConfig,
    FastVLMForConditionalGeneration,
    FastVLMImageProcessorPil,
    FastVLMProcessor,
)
from ..checkpoints.embedded import resolve_model
from ..processing_fastvlm import chat_template_for
from ..storage.atomic_files import new_directory
from ..tokens import IMAGE_TOKEN
from .parts import PARTS, set_trainable

__all__ = ["new_model", "save_model", "torch_dtype"]

_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_VICUNA_END = "</s>"

Source = str | os.PathLike[str]


def new_model(
    vision: Source | Mapping[str, Any] | FastViTHDConfig | FastViTHDModel,
    language_model: Source | Mapping[str, Any] | PreTrainedConfig | PreTrainedModel,
    tokenizer: Source | PreTrainedTokenizerBase | None = None,
    *,
    image_size: int | None = None,
    image_aspect_ratio: str = "pad",
    image_grid_pinpoints: list[Any] | None = None,
    mm_patch_merge_type: str = "flat",
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
) -> tuple[FastVLMForConditionalGeneration, FastVLMProcessor]:
    """Join a FastViTHD and a causal language model by an untrained projector, ready for stage 1.

    The conversation format is Vicuna v1 for a Llama whose tokenizer ends texts with `</s>`, and ChatML otherwise. If
    the tokenizer lacks ChatML's two tokens, they are added, with rows in the embeddings. `<image>` gets the next free
    id of the tokenizer and no row: placeholders are never embedded.

    Args:
        vision: a directory or hub repository with an encoder, alone or in a whole FastVLM of either layout, merged or
            in train-time form; or an encoder; or, for an untrained encoder, its configuration or a mapping of its
            fields.
        language_model: a directory or hub repository of a Qwen2, Qwen2.5, Qwen3, Llama or other decoder that takes
            `inputs_embeds`, or of a FastVLM, whose language model is used; or a model; or, for an untrained model, its
            configuration or a mapping of its fields with `model_type`. Without `vocab_size` in the mapping the
            tokenizer's is used.
        tokenizer: directory or hub repository of a tokenizer, or a tokenizer, which is changed; by default the language
            model's.
        image_size: height and width in pixels that images are resized to, a multiple of 64; by default the encoder's.
        image_aspect_ratio, image_grid_pinpoints, mm_patch_merge_type: see `FastVLMConfig`.
        dtype: dtype of the weights, such as `torch.float32` or "bfloat16".
        seed: random seed of the new weights. The state of PyTorch's generators is not changed.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        OSError: a directory or repository does not exist.
        ValueError: a source is another kind of model, or sizes do not match.

    Example:
        >>> model, processor = new_model("apple/FastVLM-0.5B", "Qwen/Qwen3-0.6B")  # doctest: +SKIP
        >>> save_model(model, processor, "fastvlm-qwen3")  # doctest: +SKIP
    """
    dtype = torch_dtype(dtype)
    vision, language_model = _named(vision), _named(language_model)
    tokenizer = _default_tokenizer(language_model) if tokenizer is None else _named(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        # A bare configuration keeps AutoTokenizer from reading config.json, which may be of an unknown model type.
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(tokenizer), config=PreTrainedConfig())
    words: PreTrainedTokenizerBase = tokenizer
    template = _prepare_tokenizer(words, language_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _encoder(vision, dtype)
        decoder = _decoder(language_model, words, dtype)
        _give_rows(decoder, words)
        config = _config(encoder, decoder, words, image_size, dtype)
        config_fields: dict[str, Any] = {
            "image_aspect_ratio": image_aspect_ratio,
            "mm_patch_merge_type": mm_patch_merge_type,
        }
        if image_grid_pinpoints is not None:
            config_fields["image_grid_pinpoints"] = image_grid_pinpoints
        config = FastVLMConfig(**config, **config_fields)
        processor = _processor(config, words, template)
        config.image_token_id = processor.image_token_id
        model = _assemble(config, encoder, decoder, dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        do_sample=False,
    )
    return model.eval(), processor


def save_model(
    model: FastVLMForConditionalGeneration, processor: FastVLMProcessor, directory: str | os.PathLike[str]
) -> Path:
    """Write model and processor to a new directory, which appears only when it is complete.

    Tensors have Apple's names, config.json has the nested form; the Auto classes and `checkpoints.convert` read it.

    Args:
        model, processor: the model and its processor.
        directory: a directory that does not exist yet, or is empty.

    Returns:
        The directory.

    Raises:
        FileExistsError: the directory exists and is not empty.
    """
    out = Path(directory)
    with new_directory(out) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    return out


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a floating-point dtype by its name.

    Raises:
        ValueError: it is not a floating-point dtype.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; expected a floating-point dtype, such as 'float32' or 'bfloat16'.")
    return found


def _named(source: Any) -> Any:
    """Return a source, with its name resolved if it is a name."""
    return resolve_model(source) if isinstance(source, str | os.PathLike) else source


def _default_tokenizer(language_model: Any) -> Source:
    if isinstance(language_model, str | os.PathLike):
        return language_model
    name = getattr(language_model, "name_or_path", None)
    if name:
        return str(name)
    raise ValueError("The language model has no directory, so its tokenizer is unknown. Pass one: tokenizer=…")


def _config_of(source: Any) -> PreTrainedConfig:
    """Return the configuration of a language model, given in any form that `new_model` accepts."""
    if isinstance(source, PreTrainedModel):
        return source.config
    if isinstance(source, PreTrainedConfig):
        return source
    if isinstance(source, Mapping):
        fields = dict(source)
        kind = fields.pop("model_type", None)
        if kind not in CONFIG_MAPPING:
            raise ValueError(
                f"The language model's fields have model_type {kind!r}; expected a model_type of Transformers, such as "
                "'qwen2', 'qwen3' or 'llama'."
            )
        config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(fields)
        return config
    return AutoConfig.from_pretrained(os.fspath(source))


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, language_model: Any) -> str:
    """Add the tokens of the conversation format to the tokenizer, and return the format's template."""
    vocabulary = tokenizer.get_vocab()
    text = _config_of(language_model).get_text_config()
    has_chatml = all(token in vocabulary for token in _CHATML_TOKENS)
    if text.model_type == "llama" and not has_chatml and tokenizer.eos_token == _VICUNA_END:
        template, end = chat_template_for("llama"), _VICUNA_END
    else:
        template, end = chat_template_for("qwen2"), _CHATML_TOKENS[1]
        if not has_chatml:
            tokens = [AddedToken(token, special=True, normalized=False) for token in _CHATML_TOKENS]
            tokenizer.add_tokens(tokens, special_tokens=True)
    former_end = tokenizer.eos_token
    tokenizer.eos_token = end
    if tokenizer.pad_token is None:
        # Padding is always masked, so any token works except the end of an answer.
        tokenizer.pad_token = former_end if former_end not in (None, end) else tokenizer.unk_token or end
    tokenizer.chat_template = template
    tokenizer.padding_side = "left"
    return template


def _encoder(source: Any, dtype: torch.dtype) -> FastViTHDModel:
    if isinstance(source, FastViTHDModel):
        return source.to(dtype)
    if isinstance(source, Mapping):
        source = FastViTHDConfig(**source)
    if isinstance(source, FastViTHDConfig):
        return FastViTHDModel(copy.deepcopy(source)).to(dtype)
    kind = PreTrainedConfig.get_config_dict(os.fspath(source))[0].get("model_type")
    if kind == "fast_vlm":
        raise ValueError(
            f"{source} has the layout of Transformers' own fast_vlm. Convert it once: fastvlm convert {source} OUT "
            "--to apple."
        )
    if kind not in ("fastvithd", "fastvlm", "llava_qwen2", "llava_llama"):
        raise ValueError(f"{source} has model_type {kind!r}; expected a FastViTHD, alone or in a FastVLM.")
    encoder: FastViTHDModel = FastViTHDModel.from_pretrained(os.fspath(source), dtype=dtype)
    return encoder


def _decoder(source: Any, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """Return a causal language model: `model` and `lm_head` under these names."""
    if isinstance(source, PreTrainedModel):
        decoder = source.to(dtype)
    elif isinstance(source, str | os.PathLike):
        decoder = AutoModelForCausalLM.from_pretrained(os.fspath(source), dtype=dtype)
    else:
        config = copy.deepcopy(_config_of(source))
        if isinstance(source, Mapping) and "vocab_size" not in source:
            config.vocab_size = len(tokenizer)
        decoder = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if isinstance(decoder, FastVLMForConditionalGeneration):
        whole = decoder
        with no_init_weights():
            decoder = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=dtype)
        decoder.model, decoder.lm_head = whole.model.language_model, whole.lm_head
    if not hasattr(decoder, "lm_head") or decoder.base_model_prefix != "model":
        raise ValueError(
            f"A {type(decoder).__name__} does not consist of `model` and `lm_head`; expected a decoder such as Qwen2, "
            "Qwen3 or Llama."
        )
    return decoder


def _give_rows(decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Extend the embeddings for tokens without a row; new rows are sampled around the mean of the others.

    `<image>` needs no row: placeholders are never embedded.
    """
    rows = decoder.get_input_embeddings().weight.shape[0]
    needed = 1 + max(number for token, number in tokenizer.get_vocab().items() if token != IMAGE_TOKEN)
    if needed > rows:
        decoder.resize_token_embeddings(needed, mean_resizing=True)


def _config(
    encoder: FastViTHDModel,
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    image_size: int | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    text = copy.deepcopy(decoder.config)
    text.eos_token_id, text.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    text.bos_token_id = tokenizer.bos_token_id
    vision = encoder.config.to_dict()
    if image_size is not None:
        vision["image_size"] = image_size
    return {
        "vision_config": FastViTHDConfig.from_dict(vision),
        "text_config": text,
        "tie_word_embeddings": text.tie_word_embeddings,
        "dtype": dtype,
    }


def _processor(config: FastVLMConfig, tokenizer: PreTrainedTokenizerBase, template: str) -> FastVLMProcessor:
    vision: Any = config.vision_config
    image_processor = FastVLMImageProcessorPil(
        size=vision.image_size,
        image_aspect_ratio=config.image_aspect_ratio,
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    return FastVLMProcessor(
        image_processor,
        tokenizer,
        chat_template=template,
        mm_patch_merge_type=config.mm_patch_merge_type,
        context_length=getattr(config.text_config, "max_position_embeddings", None),
    )


def _assemble(
    config: FastVLMConfig, encoder: FastViTHDModel, decoder: PreTrainedModel, dtype: torch.dtype
) -> FastVLMForConditionalGeneration:
    """Build the whole model from the tensors of its parts, without copies."""
    with no_init_weights():
        model = FastVLMForConditionalGeneration(config)
    model.tie_weights()
    model.model.vision_tower.load_state_dict(encoder.state_dict(), assign=True)
    model.model.language_model.load_state_dict(decoder.model.state_dict(), assign=True)
    if not config.tie_word_embeddings:
        model.lm_head.load_state_dict(decoder.lm_head.state_dict(), assign=True)
    fresh: list[torch.nn.Module] = [*model.model.multi_modal_projector.modules()]
    if model.model.image_newline is not None:
        fresh.append(model.model)
    for module in fresh:
        model._init_weights(module)
    model.tie_weights()
    model = model.to(dtype)
    set_trainable(model, PARTS)
    return model
