# SPDX-License-Identifier: Apache-2.0
"""FastVLM for vLLM: its Transformers backend, told about AnyRes, the encoder, and placeholders without an embedding."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.platforms import current_platform

__all__ = ["FastVLMForConditionalGeneration"]


class FastVLMMultiModalProcessor(MultiModalProcessor):
    """Divides what our processor returns among the pictures of a prompt."""

    def _get_field_config(self, modality: str, key: str, hf_inputs: Mapping[str, Any], sizes: Any) -> Any:
        """Return how a field is divided: those of AnyRes have one row a picture, `pixel_values` one a tile."""
        if key in ("image_sizes", "num_tiles"):
            return MultiModalFieldConfig.batched(modality)
        return super()._get_field_config(modality, key, hf_inputs, sizes)


@MULTIMODAL_REGISTRY.register_processor(
    FastVLMMultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class FastVLMForConditionalGeneration(TransformersMultiModalForCausalLM):
    """vLLM's wrapper of `FastVLMModel` and a head; vLLM resolves FastVLM's architecture to it."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Vicuna's "<image>" lies beyond the embedding rows.
        self.configure_mm_token_handling(self.text_config.vocab_size, [self.config.image_token_id])

    def recursive_replace(self) -> None:
        """Put vLLM's layers into the language model and the projector; the encoder keeps its own.

        Parts of it compute in float32 where its weights are float16, or the CPU has no products of their type. vLLM's
        layers take no other type than their weights', and would quantize it with the rest.
        """
        encoder, self.model.vision_tower = self.model.vision_tower, nn.Identity()
        super().recursive_replace()
        self.model.vision_tower = encoder
        if self.quant_config is not None and current_platform.is_cpu():
            for module in self.model.language_model.modules():
                if isinstance(module, LinearBase):
                    module.register_forward_pre_hook(_without_batch)
                    module.register_forward_hook(_with_batch)


def _without_batch(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Take away the batch of one of Transformers' layers: vLLM's 8-bit product for CPUs with AMX wants matrices."""
    hidden = arguments[0]
    return (hidden.squeeze(0) if hidden.ndim == 3 else hidden, *arguments[1:])


def _with_batch(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return (_with_batch(module, arguments, output[0]), *output[1:])
    return output.unsqueeze(0) if output.ndim == 2 else output
