# SPDX-License-Identifier: Apache-2.0
"""Programs of torch.export give what the model gives, for sizes other than those they were exported with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import random_pixels, relative_error
from transformers_fastvlm import FastVLMForConditionalGeneration
from transformers_fastvlm.export import programs

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> FastVLMForConditionalGeneration:
    return FastVLMForConditionalGeneration.from_pretrained(checkpoint("qwen2_untied")).eval()


def embeds(model: FastVLMForConditionalGeneration, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn((batch, length, model.config.text_config.hidden_size), generator=generator)


@torch.no_grad()
def test_vision_takes_every_batch_and_resolution(model: FastVLMForConditionalGeneration) -> None:
    encoder, projector = programs.export_encoder(model).module(), programs.export_projector(model).module()
    for batch, height, width in ((1, 128, 128), (3, 256, 192), (2, 128, 320)):
        pixels = random_pixels(batch, height, width)
        expected = model.get_image_features(pixels)
        features = encoder(pixels)
        assert relative_error(features, expected.last_hidden_state) < TOLERANCE
        assert relative_error(projector(features), expected.pooler_output) < TOLERANCE


@torch.no_grad()
def test_a_prompt_and_further_tokens_continue_each_other(model: FastVLMForConditionalGeneration) -> None:
    decode = programs.export_decode(model).module()
    text = model.config.text_config
    head_size = text.hidden_size // text.num_attention_heads
    for batch, length, past, padding in ((1, 7, 5, 0), (3, 12, 8, 4)):
        hidden = embeds(model, batch, length)
        mask = torch.ones((batch, length), dtype=torch.long)
        mask[0, :padding] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = model(inputs_embeds=hidden, attention_mask=mask, position_ids=positions).logits
        nothing = torch.zeros((batch, text.num_key_value_heads, 0, head_size))
        cache = [(nothing, nothing)] * text.num_hidden_layers
        first, cache = decode(hidden[:, :past], mask[:, :past], positions[:, :past], cache)
        rest, cache = decode(hidden[:, past:-1], mask[:, :-1], positions[:, past:-1], cache)
        last, cache = decode(hidden[:, -1:], mask, positions[:, -1:], cache)
        logits = torch.cat((first, rest, last), dim=1)
        assert relative_error(logits[mask.bool()], expected[mask.bool()]) < TOLERANCE
        assert cache[0][0].shape[2] == length


@torch.no_grad()
def test_a_placeholder_without_a_row_is_embedded(checkpoint: Callable[[str], Path]) -> None:
    model = FastVLMForConditionalGeneration.from_pretrained(checkpoint("qwen2_untied")).eval()
    rows = model.config.text_config.vocab_size
    model.config.image_token_id = rows + 5
    embed = programs.export_embedding(model).module()
    ids = torch.tensor([[3, rows + 5, 1, 2]])
    expected = model.get_input_embeddings()(torch.tensor([[3, 0, 1, 2]]))
    assert torch.equal(embed(ids), expected)


def test_a_model_in_training_mode_is_refused(checkpoint: Callable[[str], Path]) -> None:
    model = FastVLMForConditionalGeneration.from_pretrained(checkpoint("qwen2_untied")).train()
    with pytest.raises(RuntimeError, match="call eval"):
        programs.export_decode(model)
