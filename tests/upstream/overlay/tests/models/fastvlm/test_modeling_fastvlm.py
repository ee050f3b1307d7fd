# SPDX-License-Identifier: Apache-2.0
"""Transformers' tests of generative image-text models, on FastVLM."""

import copy
import unittest
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import PreTrainedModel
from transformers.testing_utils import torch_device

from transformers_fastvlm import FastVLMConfig, FastVLMForConditionalGeneration, FastVLMModel
from transformers_fastvlm.modeling_fastvithd import FastViTHDPreTrainedModel

from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from ...test_pipeline_mixin import PipelineTesterMixin
from ...test_training_mixin import TrainingTesterMixin
from .tiny import (
    IMAGE_SIZE,
    REPEATED,
    TOKENS_PER_IMAGE,
    ModelTests,
    any_weights_load,
    leave_out,
    only_pipelines,
    text_config,
    vision_config,
    without_repeated_skips,
)


class FastVLMModelTester:
    is_training = True
    batch_size = 3
    image_token_id = 5
    text_model = "qwen2"

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.text_config = text_config(self.text_model)
        # The CLIP head takes no part in generation; older tests expect a gradient for it although it is frozen.
        self.vision_config = vision_config(projection_dim=0)
        for name in ("num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads"):
            setattr(self, name, self.text_config[name])
        self.seq_length = 7 + TOKENS_PER_IMAGE
        self.causal_lm_class = FastVLMForConditionalGeneration

    def get_config(self) -> FastVLMConfig:
        return FastVLMConfig(
            text_config=copy.deepcopy(self.text_config),
            vision_config=copy.deepcopy(self.vision_config),
            image_token_id=self.image_token_id,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[FastVLMConfig, dict[str, Any]]:
        config = self.get_config()
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 6) + 6
        input_ids[:, :TOKENS_PER_IMAGE] = self.image_token_id
        return config, {
            "pixel_values": floats_tensor([self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }


class FastVLMModelTesterLlama(FastVLMModelTester):
    text_model = "llama"


class FastVLMModelTests(ModelTests):
    """Shared by the classes for the language models."""

    all_model_classes = (FastVLMModel, FastVLMForConditionalGeneration)
    additional_model_inputs = ("pixel_values",)
    _is_composite = True
    # The encoder's last hidden state is a map (images, channels, rows, columns); see `test_image_features_shapes`.
    skip_test_image_features_output_shape = True
    make_tester = FastVLMModelTester

    def setUp(self) -> None:
        self.model_tester = self.make_tester(self)
        self.config_tester = ConfigTester(
            self, config_class=FastVLMConfig, has_text_modality=False, common_properties=["image_token_id"]
        )
        if "rope" in self._testMethodName:
            # Random ids stand for plain text here, so none of them may be the placeholder.
            self.model_tester.image_token_id = self.model_tester.vocab_size
        if "eager_matches_sdpa" in self._testMethodName:
            # A smaller batch would be filled up with rows that have an image but no placeholder.
            self.model_tester.batch_size = 7

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def _image_features_get_expected_num_attentions(self, model_tester: Any = None) -> int:
        return sum(self.model_tester.vision_config["depths"][3:])

    def _image_features_get_expected_num_hidden_states(self, model_tester: Any = None) -> int:
        return len(self.model_tester.vision_config["depths"])

    def test_image_features_shapes(self) -> None:
        """The part of upstream's `test_get_image_features_output` that takes the last hidden state for a sequence."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        batch, side = self.model_tester.batch_size, IMAGE_SIZE // 64
        for model_class in self.all_model_classes:
            features = model_class(config).to(torch_device).eval().get_image_features(inputs["pixel_values"])
            assert features.last_hidden_state.shape == (batch, config.vision_config.num_features, side, side)
            assert features.pooler_output.shape == (batch, TOKENS_PER_IMAGE, self.model_tester.hidden_size)

    def test_reverse_loading_mapping(self) -> None:
        """As upstream's for models whose renamings show only with the head, since they begin with its `model.`."""
        super().test_reverse_loading_mapping(skip_base_model=True)

    def test_correct_missing_keys(self) -> None:
        """As upstream's, but a head that is not stored is the embeddings unless that rule is taken out."""
        with pytest.raises(AssertionError, match="0 not greater than 0"):
            super().test_correct_missing_keys()
        with (
            patch.object(FastVLMForConditionalGeneration, "tie_weights", PreTrainedModel.tie_weights),
            any_weights_load(),
        ):
            super().test_correct_missing_keys()

    def test_can_capture_specific_layers_hidden_states(self) -> None:
        """As upstream's, of the language model; older ones take how the encoder records for how the whole does."""
        if hasattr(ModelTesterMixin, "test_can_capture_specific_layers_hidden_states"):
            with patch.object(FastViTHDPreTrainedModel, "_can_record_outputs", {}):
                super().test_can_capture_specific_layers_hidden_states()

    def test_model_rope_scaling_frequencies(self) -> None:
        """As upstream's; 5.19's sees a rotary embedding only if its constructor has a second argument."""

        def init(self: torch.nn.Module, config: Any, device: Any = None) -> None:
            original(self, config)

        rotary = type(FastVLMModel(self.model_tester.get_config()).language_model.rotary_emb)
        original = rotary.__init__
        with patch.object(rotary, "__init__", init):
            super().test_model_rope_scaling_frequencies()

    def test_sliding_window_mask(self) -> None:
        """As upstream's, with the window where a composite model has it: in the configuration of its language model."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        window, length = 3, self.model_tester.seq_length
        distance = torch.arange(length)[:, None] - torch.arange(length)
        outside = (distance < 0) | (distance >= window)
        for model_class in self.all_model_classes:
            for sliding in (True, False):
                text = config.text_config.to_dict() | {
                    "use_sliding_window": sliding,
                    "sliding_window": window,
                    "max_window_layers": 0,
                    "layer_types": None,
                }
                config.text_config = type(config.text_config).from_dict(text)
                model = model_class._from_config(config, attn_implementation="eager").to(torch_device).eval()
                with torch.no_grad():
                    attentions = model(**inputs, output_attentions=True).attentions
                for attention in attentions:
                    assert bool((attention[:, :, outside] == 0).all()) is sliding

    def test_mismatching_num_image_tokens(self) -> None:
        """Counts of images and placeholders that differ are an error; as in upstream's tests of such models."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).to(torch_device).eval()
            model(**inputs)
            with pytest.raises(ValueError, match="placeholder"):
                model(**(inputs | {"pixel_values": inputs["pixel_values"][-2:]}))
            one, two = inputs["input_ids"][:1], inputs["pixel_values"][:2]
            with pytest.raises(ValueError, match="placeholder"):
                model(input_ids=one, pixel_values=two)
            model(input_ids=torch.cat([one, one], dim=0), pixel_values=two)
            model(input_ids=torch.cat([one, one], dim=1), pixel_values=two)


class FastVLMModelTest(
    FastVLMModelTests, ModelTesterMixin, TrainingTesterMixin, GenerationTesterMixin, unittest.TestCase
):
    model_tester = None

    def test_training_overfit(self) -> None:
        """As upstream's, which is for text models: it reads `vocab_size`, and its ids may not be the placeholder."""
        self.model_tester.image_token_id = self.model_tester.vocab_size
        config = self.model_tester.get_config()
        config.vocab_size = self.model_tester.vocab_size
        with patch.object(self.model_tester, "get_config", return_value=config):
            super().test_training_overfit()


@leave_out(*REPEATED, "test_sliding_window_mask")
@without_repeated_skips
class FastVLMModelLlamaTest(FastVLMModelTests, ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    make_tester = FastVLMModelTesterLlama


@only_pipelines("image_text_to_text", "any_to_any")
class FastVLMPipelineTest(PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {
        "image-text-to-text": FastVLMForConditionalGeneration,
        "any-to-any": FastVLMForConditionalGeneration,
    }
