# SPDX-License-Identifier: Apache-2.0
"""FastVLM: the projector, the scatter of image features into text embeddings, and the language model with its head.

Sources: FastVLM, arXiv 2412.13303, section 3; LLaVA-1.5, arXiv 2310.03744, section 3.3 (two-layer projector);
LLaVA-NeXT's AnyRes, arXiv 2407.07895, section 3 (tiles). Written from the papers and the published tensors.
"""

import os
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, LogitsProcessorList
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import torch_compilable_check
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from . import compat, kernels
from .configuration_fastvlm import FastVLMConfig
from .generation_fastvlm import NeverThePlaceholder, check_scores, has_tokens, one_cache
from .images import anyres
from .kernels.quantized import speed_up_quantized_layers
from .modeling_fastvithd import FastViTHDModel
from .outputs_fastvlm import FastVLMCausalLMOutputWithPast, FastVLMModelOutputWithPast
from .parallel_training import others_may_have_images, zero_through_vision
from .strict_loading import StrictPreTrainedModel, for_language_model_alone
from .tensor_names import rename_state
from .tokens import HUB_KEYS, image_token_id_of

REMOTE_CODE_ADVICE = (
    "Here the processor prepares text and images: processor.apply_chat_template(messages, tokenize=True, "
    'return_dict=True, return_tensors="pt"), then model.generate(**inputs). See docs/migration.md.'
)
"""What to do instead of the calls on Apple's model cards."""


class FastVLMMultiModalProjector(nn.Module):
    """Two linear layers with an activation between them, from the encoder's channels to the language model's."""

    def __init__(self, config: FastVLMConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.num_features, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Project (..., num_features) to (..., hidden_size)."""
        weight = self.linear_1.weight
        if weight.is_floating_point() and not kernels.autocasts(features):
            features = features.to(weight.dtype)  # with FSDP's mixed precision the encoder's output may differ
        return self.linear_2(self.act(self.linear_1(features)))


class FastVLMPreTrainedModel(StrictPreTrainedModel):
    """Base of the FastVLM classes: configuration, capabilities, initialisation and strict loading."""

    config: FastVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _may_be_missing = ("model.vision_tower.multi_scale.", "vision_tower.multi_scale.")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise projector and newline; encoder and language model initialise themselves."""
        super()._init_weights(module)
        if isinstance(module, FastVLMModel) and module.image_newline is not None:
            init.normal_(module.image_newline, mean=0.0, std=module.config.text_config.hidden_size**-0.5)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load a model from a directory or hub repository in Apple's layout or in this package's.

        Arguments are those of `PreTrainedModel.from_pretrained`. A `quantization_config` that lists no excluded
        modules quantizes only the language model's layers: encoder, projector and head keep their dtype.

        Raises:
            OSError, ValueError: see `StrictPreTrainedModel.from_pretrained`.
        """
        source = pretrained_model_name_or_path
        if isinstance(config, FastVLMConfig) and config.image_token_id_is_inferred and not os.path.isdir(str(source)):
            # The Auto classes do not pass the revision when they read the configuration; here it is known.
            hub = {key: kwargs[key] for key in HUB_KEYS if kwargs.get(key) is not None}
            config.image_token_id = image_token_id_of(source, **hub)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = for_language_model_alone(kwargs["quantization_config"])
        loaded = super().from_pretrained(source, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.base_model._freeze_clip_head()  # loading creates new parameters
        compat.check_adapters(model)
        compat.forget_renamings(model)
        kernels.speed_up_linear_layers(model)
        speed_up_quantized_layers(model)
        return loaded


def _accept_stored_names(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Rename the tensors of a checkpoint file to the model's names.

    `Trainer` passes them to `load_state_dict` when it resumes or loads its best model, without the renamings of
    `from_pretrained`, and would ignore all unknown names. A tied head is not in the file.
    """
    rename_state(state_dict, prefix)
    embeddings = prefix + "model.language_model.embed_tokens.weight"
    if module.config.tie_word_embeddings and embeddings in state_dict:
        state_dict.setdefault(prefix + "lm_head.weight", state_dict[embeddings])


def _has_values(input_ids: Tensor) -> bool:
    """Whether the values of the ids can be read: not on the meta device, and not while a graph is recorded."""
    return not (input_ids.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing())


def _foreign_ids(input_ids: Tensor, rows: int) -> str:
    """Return the error message for ids that have no embedding."""
    low, high = int(input_ids.min()), int(input_ids.max())
    if low == -200:
        return f"input_ids holds -200, the placeholder of Apple's remote code. {REMOTE_CODE_ADVICE}"
    return (
        f"input_ids holds {low if low < 0 else high}, but this model has embeddings for 0 to {rows - 1}. The tokenizer "
        "has tokens that the model does not: load both from one checkpoint, or call model.resize_token_embeddings."
    )


class FastVLMModel(FastVLMPreTrainedModel):
    """Encoder, projector and language model, without the head that predicts tokens."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: FastVLMConfig):
        super().__init__(config)
        self.vision_tower = FastViTHDModel._from_config(config.vision_config)
        self._freeze_clip_head()
        self.multi_modal_projector = FastVLMMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self._cache_argument = compat.cache_argument(self.language_model)
        has_newline = config.image_aspect_ratio == "anyres" and config.mm_patch_merge_type == "spatial_unpad"
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size)) if has_newline else None
        self.post_init()

    def _freeze_clip_head(self) -> None:
        """Freeze the CLIP head: nothing here uses its embedding, so it would never get a gradient."""
        if self.vision_tower.head is not None:
            self.vision_tower.head.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.language_model.set_input_embeddings(value)

    def _join_tiles(self, features: Tensor, image_sizes: Tensor, num_tiles: Tensor) -> list[Tensor]:
        """Split (tiles, tokens, hidden) by image and put each image's tokens into the order that the model expects."""
        tile = self.config.vision_config.image_size
        side = round(features.shape[1] ** 0.5)
        if features.shape[1] == side * side:
            tile = side * self.config.vision_config.stride
        joined = []
        for view, size in zip(features.split(num_tiles.tolist()), image_sizes.tolist(), strict=True):
            if self.config.mm_patch_merge_type == "flat":
                joined.append(view.flatten(0, 1))
                continue
            own = self.config.vision_config.image_size
            pinpoints = anyres.scaled_pinpoints(self.config.image_grid_pinpoints or (), own, tile)
            rows, columns = anyres.tile_grid(size, pinpoints, tile)
            if view.shape[0] != 1 + rows * columns:
                raise ValueError(
                    f"An image of {size[0]}x{size[1]} pixels has {view.shape[0]} tiles, but image_grid_pinpoints cuts "
                    f"it into {1 + rows * columns} (base view included). Use the processor of this checkpoint."
                )
            grid = view[1:].view(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
            if self.image_newline is not None:
                top, left, height, width = anyres.unpadded_grid(size, *grid.shape[:2])
                grid = grid[top : top + height, left : left + width]
                newline = self.image_newline.to(grid).expand(height, 1, -1)
                grid = torch.cat((grid, newline), dim=1)
            joined.append(torch.cat((view[0], grid.flatten(0, 1))))
        return joined

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        num_tiles: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode images and project them to the language model's hidden size.

        Args:
            pixel_values: (images, channels, height, width); with AnyRes (tiles of all images, channels, height,
                width), each image's base view first.
            image_sizes: with AnyRes, (images, 2), height and width of the images before tiling.
            num_tiles: with AnyRes, (images,), tiles of each image, base view included.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            The encoder's output with `pooler_output` replaced by the projected features: a tensor (images, tokens,
            hidden_size), with AnyRes a list of (tokens, hidden_size).

        Raises:
            ValueError: sizes or counts do not match.
        """
        outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        features = self.multi_modal_projector(outputs.last_hidden_state.flatten(2).transpose(1, 2))
        if num_tiles is not None:
            if image_sizes is None or len(image_sizes) != len(num_tiles):
                raise ValueError("num_tiles is given, so image_sizes is needed too: one (height, width) per image.")
            if int(num_tiles.sum()) != features.shape[0]:
                raise ValueError(
                    f"num_tiles adds up to {int(num_tiles.sum())}, but pixel_values holds {features.shape[0]} tiles."
                )
            features = self._join_tiles(features, image_sizes, num_tiles)
        elif self.config.image_aspect_ratio == "anyres" and image_sizes is not None:
            raise ValueError("image_sizes is given, so num_tiles is needed too: the number of tiles of each image.")
        outputs.pooler_output = features
        return outputs

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return a boolean mask (batch, length) of the `<image>` placeholders.

        Without `input_ids`, `inputs_embeds` are compared with the placeholder's embedding.
        """
        image_token_id = self.config.image_token_id
        if image_token_id is None:
            raise ValueError(
                "config.image_token_id is None, so image placeholders cannot be found. Set it to the processor's: "
                "model.config.image_token_id = processor.image_token_id."
            )
        if input_ids is not None:
            return input_ids == image_token_id
        assert inputs_embeds is not None
        rows = self.config.text_config.vocab_size
        if image_token_id >= rows:
            raise ValueError(
                f"image_token_id {image_token_id} has no embedding ({rows} rows), so the placeholders cannot be found "
                "in inputs_embeds. Pass input_ids."
            )
        token = torch.full((), image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _embed(self, input_ids: Tensor, check: bool) -> Tensor:
        """Embed tokens; placeholders beyond the embedding rows are looked up as row 0 and overwritten later."""
        image_token_id, rows = self.config.image_token_id, self.config.text_config.vocab_size
        if image_token_id is not None and image_token_id >= rows:
            input_ids = input_ids.masked_fill(input_ids == image_token_id, 0)
        if check and bool(((input_ids < 0) | (input_ids >= rows)).any()):
            raise ValueError(_foreign_ids(input_ids, rows))
        return self.get_input_embeddings()(input_ids)

    def _scatter(self, mask: Tensor, inputs_embeds: Tensor, features: Any, input_ids: Tensor | None) -> Tensor:
        """Replace the placeholders' embeddings by the features of all images, in order."""
        if not isinstance(features, Tensor):
            features = torch.cat(list(features))
        if features.shape[-1] != inputs_embeds.shape[-1]:
            raise ValueError(
                f"The image features have {features.shape[-1]} channels, but this model's hidden size is "
                f"{inputs_embeds.shape[-1]}: they come from another model. An assistant model of another size "
                "cannot use them; try prompt_lookup_num_tokens instead."
            )
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        count = features.numel() // features.shape[-1]
        if not mask.is_meta:  # without values there is nothing to count
            torch_compilable_check(
                mask.sum() == count,
                lambda: (
                    # TRL searches for the first sentence, to explain its max_length.
                    f"Image features and image tokens do not match: input_ids has {int(mask.sum())} <image> "
                    f"placeholders, but the images have {count} features. {self._advice(input_ids, count)}"
                ),
            )
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1).to(inputs_embeds.device), features)

    def _advice(self, input_ids: Tensor | None, count: int) -> str:
        """Return advice for mismatched placeholders and features: the tokenizer may use another placeholder."""
        ids, counts = (torch.empty(0),) * 2 if input_ids is None else input_ids.unique(return_counts=True)
        if (repeated := ids[counts == count]).numel() != 1 or count < 2:
            return "Let the processor make both, with one <image> in the text for each image."
        return (
            f"This model's config.image_token_id is {self.config.image_token_id}; the id that occurs {count} times is "
            f"{int(repeated)}. If that is processor.image_token_id, set model.config.image_token_id to it."
        )

    def _check_no_placeholders(self, input_ids: Tensor | None, cache: Cache | None) -> None:
        """Raise if a prompt has placeholders but no images are given."""
        if input_ids is None or self.config.image_token_id is None or not _has_values(input_ids):
            return
        if input_ids.shape[1] == 1 or has_tokens(cache):
            return
        count = int((input_ids == self.config.image_token_id).sum())
        if count:
            raise ValueError(
                f"input_ids has {count} <image> placeholders, but there are no images: pass pixel_values, or remove "
                "<image> from the text."
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_sizes: Tensor | None = None,
        num_tiles: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> FastVLMModelOutputWithPast:
        """Run the model.

        Args:
            input_ids: (batch, length), with one placeholder for every image token.
            pixel_values, image_sizes, num_tiles: see `get_image_features`; images in the order of their placeholders.
            attention_mask: (batch, length), 1 for tokens and 0 for padding.
            position_ids: (batch, length).
            cache: keys and values of earlier tokens.
            inputs_embeds: (batch, length, hidden_size) in place of `input_ids`.
            mm_encoder_outputs: {"image": output of `get_image_features`} in place of `pixel_values`.
            past_key_values: the name of `cache` before Transformers 5.24.
            kwargs: passed to the language model; `output_hidden_states` and `output_attentions` to the encoder, too.

        Raises:
            ValueError: both or neither of two alternatives are given, or counts of placeholders and features differ.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        cache = one_cache(cache, past_key_values)
        if compat.PAGES_COME_AS_CACHE and not isinstance(cache, Cache | None):
            kwargs["cache"], cache = cache, None
        images = (mm_encoder_outputs or {}).get("image")
        if images is not None and pixel_values is not None:
            raise ValueError("Pass only one of pixel_values and mm_encoder_outputs: both hold the images.")
        if images is None and pixel_values is not None:
            wanted = {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs}
            images = self.get_image_features(pixel_values, image_sizes, num_tiles, return_dict=True, **wanted)
        # Before the embedding, as with images: all processes must run their modules in the same order.
        zero = None
        if images is None and not has_tokens(cache) and others_may_have_images(self):
            zero = zero_through_vision(self)
        if inputs_embeds is None:
            assert input_ids is not None
            # Check once per prompt, not once per token: reading the values waits for the GPU.
            is_prompt = input_ids.shape[1] > 1 and isinstance(cache, Cache | None) and "cache" not in kwargs
            inputs_embeds = self._embed(input_ids, is_prompt and _has_values(input_ids))
        if images is not None:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds)
            inputs_embeds = self._scatter(mask, inputs_embeds, images.pooler_output, input_ids)
        else:
            self._check_no_placeholders(input_ids, cache)
        if zero is not None:
            inputs_embeds = inputs_embeds + zero.to(inputs_embeds.dtype)
        if kwargs.get("use_cache") is None and getattr(self.config, "use_cache", None) is False:
            kwargs["use_cache"] = False  # set by Trainer here, and read by the language model in its own configuration
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{self._cache_argument: cache},
            **kwargs,
        )
        return FastVLMModelOutputWithPast(**outputs, image_outputs=images)


class FastVLMForConditionalGeneration(FastVLMPreTrainedModel, GenerationMixin):
    """FastVLM with its language-modelling head: generates text from images and text.

    Example:
        >>> from transformers import AutoProcessor
        >>> from transformers_fastvlm import FastVLMForConditionalGeneration
        >>> model = FastVLMForConditionalGeneration.from_pretrained("apple/FastVLM-0.5B")  # doctest: +SKIP
        >>> processor = AutoProcessor.from_pretrained("apple/FastVLM-0.5B")  # doctest: +SKIP
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: FastVLMConfig):
        super().__init__(config)
        self.model = FastVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.register_load_state_dict_pre_hook(_accept_stored_names)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def get_vision_tower(self) -> nn.Module:
        """Raise an error that explains what to call instead: Apple's model cards get the image processor from here.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(f"get_vision_tower() is a call of Apple's remote code. {REMOTE_CODE_ADVICE}")

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        if "images" in model_kwargs:
            raise ValueError(f"images=… is an argument of Apple's remote code. {REMOTE_CODE_ADVICE}")
        super()._validate_model_kwargs(model_kwargs)

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        num_tiles: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode and project images. See `FastVLMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, num_tiles, **kwargs)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie head and embeddings; after loading, the checkpoint's tensors decide whether they are tied, not its flag.

        If the checkpoint stores no head, the head is tied. If it stores a head with other values, the head is not tied,
        regardless of `tie_word_embeddings`. The configuration is corrected accordingly.
        """
        if missing_keys is not None:
            head, embeddings = self.lm_head.weight, self.get_input_embeddings().weight
            head_missing = "lm_head.weight" in missing_keys
            embeddings_missing = "model.language_model.embed_tokens.weight" in missing_keys
            if head_missing and not embeddings_missing:
                self._set_tied(True)
            elif not head_missing and not embeddings_missing and head.device.type != "meta":
                if self.config.tie_word_embeddings and (head.shape != embeddings.shape or not head.equal(embeddings)):
                    self._set_tied(False)
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)

    def _set_tied(self, tied: bool) -> None:
        """Record whether the head is tied to the embeddings, for tying now and for saving later."""
        if self.config.tie_word_embeddings != tied:
            self.config.tie_word_embeddings = tied
            self.config.text_config.tie_word_embeddings = tied
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Load the checkpoint's generation_config.json and add what Apple's files omit.

        They define neither an end nor a padding token, so generation would never stop: both come from the text
        configuration. They enable sampling without a temperature, which would mean 1.0; Apple's script uses 0.2.
        """
        super().adjust_generation_fn(*args, **kwargs)
        generation, text = self.generation_config, self.config.text_config
        if generation.eos_token_id is None:
            generation.eos_token_id = text.eos_token_id
        if generation.pad_token_id is None:
            eos = generation.eos_token_id
            generation.pad_token_id = (
                text.pad_token_id if text.pad_token_id is not None else eos[0] if isinstance(eos, list) else eos
            )
        if generation.do_sample and generation.temperature is None:
            generation.temperature = 0.2

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_sizes: Tensor | None = None,
        num_tiles: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> FastVLMCausalLMOutputWithPast:
        """Predict tokens. All other arguments are those of `FastVLMModel.forward`.

        Args:
            labels: (batch, length), target ids, -100 for positions without a loss; shifted internally. Placeholders
                have no loss either, so a copy of `input_ids` may be passed.
            logits_to_keep: number of last positions to compute logits for, 0 for all; or positions, (positions,) for
                all rows or (batch, positions) for each; or a boolean mask (batch, length), which gives logits
                (true positions, vocab_size).
            kwargs: as for `FastVLMModel.forward`; `num_items_in_batch` is passed to the loss.

        Raises:
            ValueError: see `FastVLMModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            num_tiles=num_tiles,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(compat.slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            if self.config.image_token_id is not None:
                labels = labels.masked_fill(labels == self.config.image_token_id, -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return FastVLMCausalLMOutputWithPast(loss=loss, logits=logits, **rest)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pass the images in the first step only; the cache holds them for later steps."""
        if compat.GENERATE_KEEPS_ENCODER_OUTPUTS and not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("mm_encoder_outputs", None)
        return super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat a batch for beams or several returned sequences, each row with its own images."""
        if compat.GENERATE_KEEPS_ENCODER_OUTPUTS and model_kwargs.get("pixel_values") is not None:
            model_kwargs = compat.encode_and_expand_images(self, expand_size, input_ids, model_kwargs)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Add a processor that suppresses the placeholder, whatever the generation configuration is."""
        processors = super()._get_logits_processor(*args, **kwargs)
        image_token_id = self.config.image_token_id
        if image_token_id is not None and image_token_id < self.config.text_config.vocab_size:
            processors.insert(0, NeverThePlaceholder(image_token_id))
        return processors

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run the prompt; the assistant model of assisted decoding also needs the images if its cache is empty."""
        if compat.GENERATE_KEEPS_ENCODER_OUTPUTS and generation_config.prefill_chunk_size is not None:
            if model_kwargs.get("pixel_values") is not None or model_kwargs.get("mm_encoder_outputs") is not None:
                raise ValueError(
                    "prefill_chunk_size with images needs Transformers 5.20 or newer: older versions pass all images "
                    "to every chunk. Upgrade, or pass prefill_chunk_size=None."
                )
        cache = model_kwargs.get(compat.CACHE)
        is_first_iteration = is_first_iteration or not has_tokens(cache)
        outputs = super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration, **kwargs)
        check_scores(outputs.logits)
        return outputs


__all__ = [
    "FastVLMCausalLMOutputWithPast",
    "FastVLMForConditionalGeneration",
    "FastVLMModel",
    "FastVLMModelOutputWithPast",
    "FastVLMPreTrainedModel",
]
