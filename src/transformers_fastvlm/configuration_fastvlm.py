# SPDX-License-Identifier: Apache-2.0
"""Configurations of the FastViTHD encoder and of FastVLM, in the nested form of Transformers and in Apple's flat form.

Apple's checkpoints describe the whole model in one flat dictionary in LLaVA's format (`model_type` `llava_qwen2` or
`llava_llama`). It names the encoder by a string, `mm_vision_tower: mobileclip_l_1024`. `FastVLMConfig` reads both
forms and always writes the nested one.

Sources: Vasu et al., *FastVLM*, CVPR 2025, arXiv 2412.13303, section 3 and table 1 (encoder); Apple's published
config.json files (field names and values).
"""

import copy
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .checkpoint_files import read_json
from .configuration_checks import check_fields, check_model_type, explained
from .images import anyres
from .tokens import HUB_KEYS, image_token_id_of

NUM_STAGES = 5
ENCODER_STRIDE = 64
PUBLISHED_WIDTHS = (96, 192, 384, 768, 1536)

_TOWER = re.compile(r"^mobileclip_l_(\d+)$")
_TEXT_MODEL_OF = {"llava_qwen2": "qwen2", "llava_llama": "llama"}

# Keys of the flat form that do not belong in the text config: they describe LLaVA's training or are stored elsewhere.
_FLAT_KEYS_NOT_OF_THE_TEXT_MODEL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "freeze_mm_mlp_adapter",
        "image_aspect_ratio",
        "image_crop_resolution",
        "image_grid_pinpoints",
        "image_split_resolution",
        "image_token_id",
        "model_type",
        "name_or_path",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        "transformers_version",
        "tune_mm_mlp_adapter",
        "unfreeze_mm_vision_tower",
        "use_mm_proj",
        "vision_config",
    }
)

# Named sizes: the language model of each, as in Apple's config.json (0.5B) and the Qwen2 and Vicuna releases.
_QWEN2 = {
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "sliding_window": 32768,
    "use_sliding_window": False,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "0.5b": {
        "image_token_id": 151646,
        "tie_word_embeddings": True,
        "text_config": _QWEN2
        | {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    },
    "1.5b": {
        "image_token_id": 151646,
        "tie_word_embeddings": True,
        "text_config": _QWEN2
        | {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "max_window_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    },
    "7b": {
        "image_token_id": 151665,
        "tie_word_embeddings": False,
        "text_config": _QWEN2
        | {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
    },
    "vicuna-7b": {
        "image_token_id": 32000,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    },
}


def is_flat(config: dict[str, Any]) -> bool:
    """Whether `config` is a configuration in Apple's flat form."""
    return config.get("model_type") in _TEXT_MODEL_OF


def nested_from_flat(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the nested form of a configuration in Apple's flat form, without `image_token_id`.

    An additional key `vision_config` may describe an encoder that differs from the published one.

    Raises:
        ValueError: the vision tower is not FastViTHD, the projector is not the two-layer one, a LLaVA option that
            Apple's models do not use is set, or two sizes contradict each other.
    """
    model_type = flat["model_type"]
    tower = flat.get("mm_vision_tower", flat.get("vision_tower"))
    match = _TOWER.match(tower) if isinstance(tower, str) else None
    if match is None:
        raise ValueError(
            f"This checkpoint has model_type {model_type!r} and mm_vision_tower {tower!r}. FastVLM checkpoints name "
            "a tower mobileclip_l_<pixels>, such as mobileclip_l_1024; other towers belong to other models of the "
            "LLaVA family, which this package does not load. Use the checkpoint's own code."
        )
    projector = flat.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise ValueError(
            f"mm_projector_type is {projector!r}, expected 'mlp2x_gelu' (two linear layers with a GELU between them), "
            "which is the only projector of the FastVLM checkpoints."
        )
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if flat.get(key):
            raise ValueError(
                f"{key} is {flat[key]!r}, expected false: FastVLM marks an image by one <image> token only."
            )

    image_size = int(match.group(1))
    vision = dict(flat.get("vision_config") or {})
    vision.pop("model_type", None)
    if vision.setdefault("image_size", image_size) != image_size:
        raise ValueError(
            f"mm_vision_tower {tower!r} says {image_size} pixels, but vision_config.image_size is "
            f"{vision['image_size']}. Make the two equal in config.json."
        )
    features = vision_features(vision.get("hidden_sizes"), vision.get("multi_scale"))
    if flat.get("mm_hidden_size", features) != features:
        raise ValueError(
            f"mm_hidden_size is {flat['mm_hidden_size']}, but an encoder of these widths has {features} output "
            "channels. The checkpoint's config.json contradicts itself."
        )

    text = {
        key: value
        for key, value in flat.items()
        if key not in _FLAT_KEYS_NOT_OF_THE_TEXT_MODEL and not key.startswith("mm_")
    }
    text["model_type"] = _TEXT_MODEL_OF[model_type]
    nested: dict[str, Any] = {
        "architectures": ["FastVLMForConditionalGeneration"],
        "model_type": FastVLMConfig.model_type,
        "vision_config": vision,
        "text_config": text,
        "image_aspect_ratio": flat.get("image_aspect_ratio") or "square",
        "image_grid_pinpoints": flat.get("image_grid_pinpoints"),
        "mm_patch_merge_type": flat.get("mm_patch_merge_type") or "flat",
        "tie_word_embeddings": flat.get("tie_word_embeddings", False),
    }
    for key in ("torch_dtype", "dtype", "quantization_config"):
        if key in text:
            value = text.pop(key)
            nested["dtype" if key == "torch_dtype" else key] = value
    return nested


def vision_features(hidden_sizes: Any, multi_scale: str | None = None) -> int:
    """Return the number of output channels of an encoder: twice the last width, plus the other stages' if multi-scale.

    Args:
        hidden_sizes: the five widths, or None for those of the published encoder.
        multi_scale: None, "pool" or "conv" (see `FastViTHDConfig`).
    """
    widths = PUBLISHED_WIDTHS if hidden_sizes is None else hidden_sizes
    own = 2 * widths[-1]
    return own + sum(widths[:-1]) if multi_scale else own


# `get_config_dict` passes the location of config.json to `from_dict` under this key, for error messages.
_READ_FROM = "_read_from"


class _CheckedConfig(PreTrainedConfig):
    """Base of both configurations: an invalid file raises an error that names folder, file and field."""

    _also_of: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json unchanged, and check it.

        Raises:
            ValueError: config.json describes another model, or a field has an invalid value.
        """
        file = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "", "config.json")
        if os.path.isfile(file):
            read_json(Path(file))  # Transformers assumes that the JSON is an object
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_model_type(config, pretrained_model_name_or_path, cls._also_of)
        check_fields(config, pretrained_model_name_or_path)
        return config, kwargs | {_READ_FROM: pretrained_model_name_or_path}


@strict
class FastViTHDConfig(BackboneConfigMixin, _CheckedConfig):
    """Configuration of the FastViTHD encoder; the defaults are those of every published FastVLM.

    Args:
        num_channels: channels of the input image.
        image_size: height and width, in pixels, that the encoder was trained with: the image processor's default.
            The encoder accepts any height and width that are multiples of 64.
        depths: blocks in each of the five stages.
        hidden_sizes: channels of each of the five stages; the last two are multiples of `attention_head_dim`.
        mlp_ratio: widening of the convolutional feed-forward network.
        attention_head_dim: channels of one attention head in stages 4 and 5.
        projection_dim: size of the CLIP embedding, or 0 for an encoder without that head.
        reparameterized: True for the merged form of all published checkpoints, False for the train-time form with
            parallel branches, which `FastViTHDModel.reparameterize` merges.
        hidden_act: activation; "gelu" is the exact one.
        multi_scale: None, or how the outputs of stages 1 to 4 are downsampled to the last stage's resolution, to be
            concatenated with its output: "pool" averages, "conv" applies strided depthwise convolutions (paper,
            section 3.2.2 and table 2). No published checkpoint uses it.
        layer_norm_eps: epsilon of the channel-wise LayerNorms.
        batch_norm_eps: epsilon of the BatchNorms.
        layer_scale_init_value: initial value of a new model's layer scales.
        drop_path_rate: stochastic depth rate of the last block in training, in [0, 1); it grows linearly from 0.
        freeze_batch_norm: whether BatchNorm uses its running statistics in training too, as the reference code's
            fine-tuning does; None means yes for the merged form and no for the train-time form.
        attention_dropout: dropout of attention weights when training, in [0, 1).
        initializer_range: standard deviation of a new model's matrices.

    Example:
        >>> from transformers_fastvlm import FastViTHDConfig
        >>> FastViTHDConfig().num_features
        3072
    """

    model_type = "fastvithd"
    base_config_key = "vision_config"
    _also_of: ClassVar[tuple[str, ...]] = ("fastvithd",)

    num_channels: int = 3
    image_size: int = 1024
    depths: list[int] | tuple[int, ...] = (2, 12, 24, 4, 2)
    hidden_sizes: list[int] | tuple[int, ...] = PUBLISHED_WIDTHS
    mlp_ratio: int | float = 4
    attention_head_dim: int = 32
    projection_dim: int | None = 768
    reparameterized: bool = True
    hidden_act: str = "gelu"
    multi_scale: Literal["pool", "conv"] | None = None
    layer_norm_eps: float = 1e-5
    batch_norm_eps: float = 1e-5
    layer_scale_init_value: float = 1e-5
    drop_path_rate: float | int = 0.0
    freeze_batch_norm: bool | None = None
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("depths", "hidden_sizes"):
            value = getattr(self, name)
            if len(value) != NUM_STAGES or any(v < 1 for v in value):
                raise ValueError(f"{name} is {list(value)}, expected {NUM_STAGES} positive integers, one per stage.")
        for width in self.hidden_sizes[3:]:
            if width % self.attention_head_dim:
                raise ValueError(
                    f"hidden_sizes is {list(self.hidden_sizes)}, but the last two must be multiples of "
                    f"attention_head_dim ({self.attention_head_dim}): those stages use attention."
                )
        if any(wide % narrow for narrow, wide in pairwise(self.hidden_sizes)):
            raise ValueError(
                f"hidden_sizes is {list(self.hidden_sizes)}, but each must be a multiple of the one before: "
                "downsampling is a depthwise convolution that multiplies the channels."
            )
        if self.image_size < ENCODER_STRIDE or self.image_size % ENCODER_STRIDE:
            raise ValueError(f"image_size is {self.image_size}, expected a positive multiple of {ENCODER_STRIDE}.")
        if not 0 <= self.drop_path_rate < 1 or not 0 <= self.attention_dropout < 1:
            raise ValueError(
                f"drop_path_rate is {self.drop_path_rate} and attention_dropout is {self.attention_dropout}, expected "
                "both in [0, 1)."
            )
        self.stage_names = ["stem", *(f"stage{stage}" for stage in range(1, NUM_STAGES + 1))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        kwargs.pop("stage_names", None)
        super().__post_init__(**kwargs)

    @property
    def num_features(self) -> int:
        """Channels of the encoder's output, 3072 for the published one."""
        return vision_features(self.hidden_sizes, self.multi_scale)

    @property
    def hidden_size(self) -> int:
        """The same as `num_features`, under the name that generic code expects."""
        return self.num_features

    @property
    def stride(self) -> int:
        """Pixels of the input per position of the output, along each axis."""
        return ENCODER_STRIDE

    @property
    def num_hidden_layers(self) -> int:
        """Number of hidden states that the encoder returns: one per stage."""
        return NUM_STAGES

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read an encoder's config.json, or that of a whole FastVLM in either form."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        with explained(config, pretrained_model_name_or_path):
            return (nested_from_flat(config) if is_flat(config) else config), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from a dictionary."""
        source = kwargs.pop(_READ_FROM, None) or kwargs.get("name_or_path")
        with explained(config_dict, source):
            return super().from_dict(config_dict, **kwargs)


@strict
class FastVLMConfig(_CheckedConfig):
    """Configuration of a FastVLM: an encoder, a two-layer projector and a causal language model.

    Args:
        vision_config: a `FastViTHDConfig` or its dictionary; default the published encoder.
        text_config: the configuration of any causal language model of Transformers that takes `inputs_embeds`, such
            as Qwen2, Qwen3 or Llama, or its dictionary with a `model_type`; default Qwen2's defaults.
        image_token_id: id of the `<image>` placeholder. It depends on the tokenizer, so there is no default. For
            Apple's checkpoints it is derived from the tokenizer files; for others use
            `FastVLMProcessor.image_token_id`. It may lie beyond the embedding rows: placeholders are never embedded.
        projector_hidden_act: activation between the projector's two layers.
        image_aspect_ratio: how images are made square: "pad", "square" (centre crop) or "anyres" (tiles).
        image_grid_pinpoints: for "anyres", the resolutions to choose from, as (width, height) pairs in pixels.
        mm_patch_merge_type: for "anyres": "flat" concatenates the tiles' tokens, "spatial" puts the tiles' tokens in
            reading order, "spatial_unpad" also drops padding and ends each row with a learned `image_newline`.
        tie_word_embeddings: whether the head shares the embeddings' weight.

    Example:
        >>> from transformers_fastvlm import FastVLMConfig
        >>> FastVLMConfig.from_preset("0.5b").text_config.hidden_size
        896
    """

    model_type = "fastvlm"
    attribute_map: ClassVar[dict[str, str]] = {"image_token_index": "image_token_id"}
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": FastViTHDConfig, "text_config": AutoConfig}
    # Outputs that `Trainer` drops from an evaluation's predictions. Transformers >= 5.24 names the cache `cache`.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "cache",
        "image_hidden_states",
        "image_outputs",
    ]

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_id: int | None = None
    projector_hidden_act: str = "gelu"
    image_aspect_ratio: Literal["pad", "square", "anyres"] = "pad"
    image_grid_pinpoints: list[Any] | tuple[Any, ...] | None = None
    mm_patch_merge_type: Literal["flat", "spatial", "spatial_unpad"] = "flat"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # Whether the id was derived from tokenizer files, not read from config.json; never saved.
        self._image_token_id_is_inferred = kwargs.pop("image_token_id_is_inferred", False)
        if self.vision_config is None:
            self.vision_config = FastViTHDConfig()
        elif isinstance(self.vision_config, dict):
            self.vision_config = FastViTHDConfig.from_dict(dict(self.vision_config))
        if self.text_config is None:
            self.text_config = CONFIG_MAPPING["qwen2"]()
        elif isinstance(self.text_config, dict):
            text = dict(self.text_config)
            model_type = text.pop("model_type", "qwen2")
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"text_config.model_type is {model_type!r}, which this version of Transformers does not support."
                )
            self.text_config = CONFIG_MAPPING[model_type].from_dict(text)
        if self.image_aspect_ratio == "anyres" or self.image_grid_pinpoints is not None:
            self.image_grid_pinpoints = anyres.check_pinpoints(
                self.image_grid_pinpoints, cast(FastViTHDConfig, self.vision_config).image_size
            )
        super().__post_init__(**kwargs)

    @property
    def image_token_id_is_inferred(self) -> bool:
        """Whether `image_token_id` was derived from tokenizer files, as for Apple's checkpoints."""
        return self._image_token_id_is_inferred

    def to_dict(self) -> dict[str, Any]:
        """Return the nested form, as it is written to config.json."""
        output = super().to_dict()
        output.pop("_image_token_id_is_inferred", None)
        return output

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "FastVLMConfig":
        """Return the configuration of a known size: "0.5b", "1.5b", "7b" or "vicuna-7b".

        Args:
            name: the size, case-insensitive.
            overrides: fields of this class that replace the preset's.

        Raises:
            ValueError: the name is unknown.
        """
        preset = _PRESETS.get(name.lower())
        if preset is None:
            raise ValueError(f"Unknown size {name!r}; the sizes are {', '.join(_PRESETS)}.")
        return cls(**(copy.deepcopy(preset) | overrides))

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json in either form; Apple's is returned nested, with `image_token_id` from the tokenizer."""
        hub = {key: kwargs[key] for key in HUB_KEYS if kwargs.get(key) is not None}
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if is_flat(config):
            with explained(config, pretrained_model_name_or_path):
                config = _with_image_token_id(config, str(pretrained_model_name_or_path), hub)
        return config, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from a dictionary in either form.

        For Apple's form, `name_or_path` in `kwargs` (the Auto classes pass it) locates the tokenizer files.
        """
        source = kwargs.pop(_READ_FROM, None) or kwargs.get("name_or_path")
        check_fields(config_dict, source)
        with explained(config_dict, source):
            if is_flat(config_dict):
                config_dict = _with_image_token_id(config_dict, source, None)
            return super().from_dict(config_dict, **kwargs)


class LlavaQwen2Config(FastVLMConfig):
    """Registered for `llava_qwen2`, the model type in Apple's config.json, so that AutoConfig reads it as FastVLM."""

    model_type = "llava_qwen2"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return FastVLMConfig.from_dict(config_dict, **kwargs)


class LlavaLlamaConfig(FastVLMConfig):
    """Registered for `llava_llama`, the model type of the Vicuna variants, so that AutoConfig reads it as FastVLM."""

    model_type = "llava_llama"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return FastVLMConfig.from_dict(config_dict, **kwargs)


def _with_image_token_id(flat: dict[str, Any], source: str | None, hub: dict[str, Any] | None) -> dict[str, Any]:
    """Return the nested form of `flat`, with the id that `<image>` has, or will get, in the tokenizer in `source`.

    Args:
        flat: Apple's form.
        source: directory, config file or hub repository that it was read from, if known.
        hub: the hub arguments it was read with, or None if unknown. If None, only the default cache is searched;
            `FastVLMPreTrainedModel.from_pretrained`, which has the arguments, searches again.
    """
    nested = nested_from_flat(flat)
    if flat.get("image_token_id") is not None:
        return nested | {"image_token_id": flat["image_token_id"]}
    if not source:
        return nested
    folder = os.path.dirname(source) if os.path.isfile(source) else source
    if hub is not None or os.path.isdir(folder) or isinstance(try_to_load_from_cache(folder, "config.json"), str):
        nested["image_token_id"] = image_token_id_of(folder, **(hub or {}))
    return nested | {"image_token_id_is_inferred": True}
