# SPDX-License-Identifier: Apache-2.0
"""The config.json of each layout, written from and read into a `FastVLMConfig`.

`FastVLMConfig` reads Apple's flat form. The native port's config.json does not describe image preprocessing, so these
fields are stored in an additional key, `fastvlm`, which Transformers keeps and does not use.
"""

from math import isqrt
from pathlib import Path
from typing import Any

from .. import compat
from ..checkpoint_files import read_json
from ..configuration_fastvlm import FastViTHDConfig, FastVLMConfig

__all__ = ["apple_config", "config_from_native", "native_config", "native_processor_files", "native_vocabulary"]

NATIVE_KEY = "fastvlm"
"""Key of a native config.json for values that the port has no field for."""

_APPLE_NAMES = {"qwen2": ("llava_qwen2", "LlavaQwen2ForCausalLM"), "llama": ("llava_llama", "LlavaLlamaForCausalLM")}
# LLaVA's training options in Apple's files, as published.
_APPLE_CONSTANTS: dict[str, Any] = {
    "freeze_mm_mlp_adapter": False,
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "tokenizer_model_max_length": 8192,
    "tokenizer_padding_side": "right",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": True,
    "use_mm_proj": True,
}
# Fields of the text config that Apple's flat form has, per language model.
_TEXT_FIELDS = (
    "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range",
    "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pad_token_id", "rms_norm_eps", "use_cache", "vocab_size",
)  # fmt: skip
_TEXT_FIELDS_OF = {
    "qwen2": ("max_window_layers", "sliding_window", "use_sliding_window"),
    "llama": ("attention_bias", "head_dim", "mlp_bias", "pretraining_tp"),
}
_ENCODER_SHAPE = ("attention_head_dim", "depths", "hidden_sizes", "mlp_ratio", "projection_dim")
_ENCODER_FIELDS = (
    *_ENCODER_SHAPE, "num_channels", "reparameterized", "hidden_act", "multi_scale", "layer_norm_eps", "batch_norm_eps",
    "freeze_batch_norm",
)  # fmt: skip
# Fields of the encoder that timm's fastvit_mci3 fixes.
_NATIVE_FIXED = ("attention_head_dim", "hidden_act", "multi_scale", "layer_norm_eps", "batch_norm_eps")
_NATIVE_IMAGE_FIELDS = ("image_aspect_ratio", "image_grid_pinpoints", "mm_patch_merge_type")


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _differs(config: FastViTHDConfig, field: str) -> bool:
    return bool(_jsonable(getattr(config, field)) != _jsonable(getattr(FastViTHDConfig(), field)))


def _dtype_name(config: FastVLMConfig) -> str | None:
    return None if config.dtype is None else str(config.dtype).removeprefix("torch.")


def apple_config(config: FastVLMConfig) -> dict[str, Any]:
    """Return Apple's flat config.json, with a `vision_config` only if the encoder is not the published one.

    Raises:
        ValueError: Apple's layout cannot express the language model or the projector.
    """
    text: Any = config.text_config
    vision: Any = config.vision_config
    if text.model_type not in _APPLE_NAMES:
        raise ValueError(
            f"The language model is a {text.model_type!r}; Apple's layout has names for {' and '.join(_APPLE_NAMES)} "
            "only. Convert to the layout 'transformers' instead."
        )
    if config.projector_hidden_act != "gelu":
        raise ValueError(
            f"projector_hidden_act is {config.projector_hidden_act!r}; Apple's layout supports 'gelu' only. Convert to "
            "the layout 'transformers' instead."
        )
    model_type, architecture = _APPLE_NAMES[text.model_type]
    flat = dict(_APPLE_CONSTANTS)
    for field in _TEXT_FIELDS + _TEXT_FIELDS_OF[text.model_type]:
        if hasattr(text, field):
            flat[field] = getattr(text, field)
    rope = dict(getattr(text, "rope_parameters", None) or {})
    flat["rope_theta"] = rope.pop("rope_theta", getattr(text, "rope_theta", 10000.0))
    flat["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    flat |= {
        "architectures": [architecture],
        "image_aspect_ratio": config.image_aspect_ratio,
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "mm_hidden_size": vision.num_features,
        "mm_patch_merge_type": config.mm_patch_merge_type,
        "mm_vision_tower": f"mobileclip_l_{vision.image_size}",
        "model_type": model_type,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": _dtype_name(config),
        "transformers_version": compat.VERSION,
    }
    different = [field for field in _ENCODER_FIELDS if _differs(vision, field)]
    if different:
        fields = dict.fromkeys([*(_ENCODER_SHAPE if set(different) & set(_ENCODER_SHAPE) else ()), *different])
        flat["vision_config"] = {field: _jsonable(getattr(vision, field)) for field in sorted(fields)}
    return dict(sorted(flat.items()))


def native_config(config: FastVLMConfig, vocabulary: int) -> dict[str, Any]:
    """Return the config.json of Transformers' `fast_vlm`, whose encoder is timm's `fastvit_mci3`.

    Args:
        config: the model's configuration, with the stored vocabulary size.
        vocabulary: rows of the vocabulary before rows were added for `<image>`, for converting back.

    Raises:
        ValueError: the encoder differs from FastViTHD in a field that timm's encoder fixes, or there is no image token.
    """
    vision: Any = config.vision_config
    text: Any = config.text_config
    fixed = [field for field in _NATIVE_FIXED if _differs(vision, field)]
    if fixed:
        values = ", ".join(f"{field}={_jsonable(getattr(vision, field))!r}" for field in fixed)
        raise ValueError(
            f"The encoder has {values}; the native fast_vlm uses timm's fastvit_mci3, where these are fixed. Convert "
            "to the layout 'transformers' instead."
        )
    if config.image_token_id is None:
        raise ValueError(
            "The id of <image> is unknown, and the native fast_vlm needs it: the source has no tokenizer files. Add "
            "the tokenizer files to the source directory."
        )
    model_args: dict[str, Any] = {"inference_mode": vision.reparameterized}
    if _differs(vision, "depths"):
        model_args["layers"] = list(vision.depths)
    if _differs(vision, "hidden_sizes"):
        model_args["embed_dims"] = list(vision.hidden_sizes)
    if _differs(vision, "mlp_ratio"):
        model_args["mlp_ratios"] = [vision.mlp_ratio] * len(vision.depths)
    if _differs(vision, "num_channels"):
        model_args["in_chans"] = vision.num_channels
    text_fields = {key: value for key, value in text.to_dict().items() if key not in ("_name_or_path", "architectures")}
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "model_type": "fast_vlm",
        "image_seq_length": (vision.image_size // vision.stride) ** 2,
        "image_token_index": config.image_token_id,
        "multimodal_projector_bias": True,
        "projector_hidden_act": config.projector_hidden_act,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": config.tie_word_embeddings,
        "text_config": text_fields | {"model_type": text.model_type, "tie_word_embeddings": config.tie_word_embeddings},
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": vision.num_features,
            "initializer_range": vision.initializer_range,
            "model_args": model_args,
            "label_names": [],
            "num_classes": 0,
        },
        NATIVE_KEY: {field: getattr(config, field) for field in _NATIVE_IMAGE_FIELDS}
        | {"image_size": vision.image_size, "vocab_size": vocabulary},
        "dtype": _dtype_name(config),
        "transformers_version": compat.VERSION,
    }


def native_vocabulary(native: dict[str, Any]) -> int | None:
    """Return the vocabulary rows before a conversion to the native layout, if config.json states them."""
    rows = (native.get(NATIVE_KEY) or {}).get("vocab_size")
    return rows if isinstance(rows, int) and rows > 0 else None


def native_processor_files(config: FastVLMConfig) -> dict[str, dict[str, Any]]:
    """Return the JSON files, by name, from which Transformers builds a `LlavaProcessor` for a native directory.

    With "pad" images are padded to a black square and resized, with "square" they are resized and centre-cropped.
    AnyRes has no counterpart in the port; its images are padded.
    """
    vision: Any = config.vision_config
    side = vision.image_size
    return {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_pad": config.image_aspect_ratio != "square",
            "do_resize": True,
            "size": {"shortest_edge": side},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.0, 0.0, 0.0],
            "image_std": [1.0, 1.0, 1.0],
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 0,
            "patch_size": vision.stride,
            "vision_feature_select_strategy": "full",
        },
    }


def config_from_native(directory: Path) -> tuple[FastVLMConfig, list[str]]:
    """Return the `FastVLMConfig` of a directory of the native port, and notes on assumed values.

    Image preprocessing comes from the key `fastvlm`, otherwise from the image processor's file, otherwise from Apple's
    published models, with a note. The vocabulary size is the stored one, including rows added by a conversion.

    Raises:
        ValueError: the encoder is not FastViTHD, or the port uses options that FastVLM does not have.
    """
    path = directory / "config.json"
    native = read_json(path)
    if not native.get("text_config") or not native.get("vision_config"):
        raise ValueError(f"{path} lacks text_config or vision_config, which hold the sizes of the model.")
    vision = native["vision_config"]
    architecture = str(vision.get("architecture")).partition(".")[0]
    model_args = dict(vision.get("model_args") or {})
    model_args.pop("inference_mode", None)
    depths, widths = model_args.pop("layers", None), model_args.pop("embed_dims", None)
    ratios = set(model_args.pop("mlp_ratios", None) or [4])
    fields: dict[str, Any] = {
        "num_channels": model_args.pop("in_chans", 3),
        "projection_dim": 0,
        "initializer_range": vision.get("initializer_range", 0.02),
    }
    if architecture != "fastvit_mci3" or model_args or len(ratios) != 1:
        raise ValueError(
            f"{path} has the encoder {architecture!r} with model_args {vision.get('model_args')}; "
            "expected timm's fastvit_mci3, with no other changes than inference_mode, layers, embed_dims, mlp_ratios "
            "(one for all stages) and in_chans."
        )
    if not native.get("multimodal_projector_bias", True):
        raise ValueError(f"{path} has multimodal_projector_bias false; FastVLM's projector has biases.")
    fields["mlp_ratio"] = ratios.pop()
    if depths is not None:
        fields["depths"] = depths
    if widths is not None:
        fields["hidden_sizes"] = widths

    known = native.get(NATIVE_KEY) or {}
    image: dict[str, Any] = {field: known[field] for field in _NATIVE_IMAGE_FIELDS if field in known}
    notes = []
    if "image_aspect_ratio" not in image:
        pads = _image_processor(directory).get("do_pad")
        image["image_aspect_ratio"] = "square" if pads is False else "pad"
        if pads is None:
            notes.append("the source does not state image_aspect_ratio; assuming 'pad', as in Apple's models")
    fields["image_size"] = known.get("image_size") or _image_size(directory, native)
    if not fields["image_size"]:
        fields["image_size"] = FastViTHDConfig().image_size
        notes.append(f"the source does not state the image size; assuming {fields['image_size']}, as in Apple's models")

    text = dict(native["text_config"])
    text.setdefault("model_type", "qwen2")
    config = FastVLMConfig(
        vision_config=fields,
        text_config=text,
        image_token_id=native.get("image_token_index", native.get("image_token_id", 151646)),
        projector_hidden_act=native.get("projector_hidden_act", "gelu"),
        tie_word_embeddings=bool(native.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        dtype=native.get("dtype", native.get("torch_dtype")),
        **image,
    )
    return config, notes


def _image_processor(directory: Path) -> dict[str, Any]:
    """Return the image processor's settings, from either of the files that may hold them; empty if neither does."""
    for file, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        if (directory / file).is_file():
            content = read_json(directory / file)
            settings = content.get(key) if key else content
            if settings:
                return dict(settings)
    return {}


def _image_size(directory: Path, native: dict[str, Any]) -> int | None:
    settings = _image_processor(directory)
    for key in ("crop_size", "size"):
        value = settings.get(key)
        side = value.get("height", value.get("shortest_edge")) if isinstance(value, dict) else value
        if isinstance(side, int):
            return side
    tokens = native.get("image_seq_length")
    if isinstance(tokens, int) and tokens > 0 and isqrt(tokens) ** 2 == tokens:
        return 64 * isqrt(tokens)
    return None
