# SPDX-License-Identifier: Apache-2.0
"""Outputs of the FastVLM models: those of the installed Transformers' language models, and `image_outputs`."""

from dataclasses import dataclass
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

__all__ = ["FastVLMCausalLMOutputWithPast", "FastVLMModelOutputWithPast"]


class _WithImageOutputs:
    """Base of outputs that hold an image encoder's output."""

    image_outputs: BaseModelOutputWithPooling | None

    @property
    def image_hidden_states(self) -> Any:
        """The features at the placeholders, `image_outputs.pooler_output`, under their old name."""
        return None if self.image_outputs is None else self.image_outputs.pooler_output

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None, the image encoder's output as a nested tuple."""
        values = super().to_tuple()  # type: ignore[misc]
        own = self.image_outputs
        return tuple(own.to_tuple() if own is not None and value is own else value for value in values)


@dataclass
class FastVLMModelOutputWithPast(_WithImageOutputs, BaseModelOutputWithPast):
    """Output of `FastVLMModel`: that of the installed Transformers' language models, and `image_outputs`.

    Args:
        last_hidden_state: (batch, length, hidden_size) of the language model.
        cache: the language model's cache; `past_key_values` before Transformers 5.24.
        hidden_states: of the language model, one more than layers, each (batch, length, hidden_size).
        attentions: of the language model, one per layer, each (batch, heads, length, length).
        image_outputs: output of `get_image_features`; None without images. Its `pooler_output` holds the features at
            the placeholders: (images, tokens, hidden_size), or a list of (tokens, hidden_size) if images have
            different numbers of tokens.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class FastVLMCausalLMOutputWithPast(_WithImageOutputs, CausalLMOutputWithPast):
    """Output of `FastVLMForConditionalGeneration`: that of the installed Transformers' models, and `image_outputs`.

    Args:
        loss: scalar, if labels were given.
        logits: (batch, kept positions, vocab_size).
        cache: the language model's cache; `past_key_values` before Transformers 5.24.
        hidden_states: of the language model, one more than layers, each (batch, length, hidden_size).
        attentions: of the language model, one per layer, each (batch, heads, length, length).
        image_outputs: as in `FastVLMModelOutputWithPast`.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
