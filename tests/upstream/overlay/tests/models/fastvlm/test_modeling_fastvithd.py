# SPDX-License-Identifier: Apache-2.0
"""Transformers' tests of vision models and backbones, on the FastViTHD encoder."""

import unittest
from typing import Any

import torch
from transformers.testing_utils import torch_device

from transformers_fastvlm import FastViTHDBackbone, FastViTHDConfig, FastViTHDModel

from ...test_backbone_common import BackboneTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor
from ...test_pipeline_mixin import PipelineTesterMixin
from .tiny import IMAGE_SIZE, REPEATED, ModelTests, leave_out, only_pipelines, vision_config, without_repeated_skips

# Tests of what an encoder does not have: token embeddings, language modelling and its loss, sub-models, a plan for
# tensor parallelism.
NOT_OF_ENCODERS = (
    "test_*_composite_model*",
    "test_*tp_plan*",
    "test_attn_implementation_composite_models",
    "test_enable_input_require_grads_with_*",
    "test_internal_model_config_and_subconfig_are_same",
    "test_reverse_loading_mapping",
    "test_training*",
    "test_causal_lm_loss*",
    "test_encoder_decoder*",
    "test_inputs_embeds*",
    "test_model_rope*",
    "test_moe_models*",
    "test_output_router_logits*",
    "test_eager_matches_batched_and_grouped*",
    "test_resize_embeddings*",
    "test_resize_position*",
    "test_resize_tokens*",
    "test_sliding_window*",
    "test_vision_axial_rope*",
)


class FastViTHDModelTester:
    is_training = False
    batch_size = 3
    num_hidden_layers = 2  # attention blocks
    expected_num_hidden_layers = 5  # stages
    overrides: dict[str, Any] = {}

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> FastViTHDConfig:
        return FastViTHDConfig(**vision_config(out_features=["stage2", "stage3", "stage5"], **self.overrides))

    def prepare_config_and_inputs_for_common(self) -> tuple[FastViTHDConfig, dict[str, Any]]:
        pixel_values = floats_tensor([self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE // 2])
        return self.get_config(), {"pixel_values": pixel_values}


class FastViTHDModelTesterTrainForm(FastViTHDModelTester):
    overrides = {"reparameterized": False, "multi_scale": "conv"}


class FastViTHDModelTests(ModelTests):
    """Shared by the merged and the train-time form."""

    all_model_classes = (FastViTHDModel, FastViTHDBackbone)
    test_resize_embeddings = False
    make_tester = FastViTHDModelTester

    def setUp(self) -> None:
        self.model_tester = self.make_tester(self)
        self.config_tester = ConfigTester(
            self, config_class=FastViTHDConfig, has_text_modality=False, common_properties=["hidden_size", "image_size"]
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def _check_stages(self, hidden_states: Any, config: FastViTHDConfig) -> None:
        shapes = [tuple(state.shape) for state in hidden_states]
        batch, height, width = self.model_tester.batch_size, IMAGE_SIZE, IMAGE_SIZE // 2
        strides = (4, 8, 16, 32, 64)
        widths = config.hidden_sizes
        assert shapes == [(batch, w, height // s, width // s) for w, s in zip(widths, strides, strict=True)]

    def test_hidden_states_output(self) -> None:
        """As upstream's, but hidden states are the maps of the five stages."""
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).to(torch_device).eval()
            with torch.no_grad():
                self._check_stages(model(**inputs, output_hidden_states=True).hidden_states, config)
            config.output_hidden_states = True
            model = model_class(config).to(torch_device).eval()
            with torch.no_grad():
                self._check_stages(model(**inputs).hidden_states, config)

    def test_attention_outputs(self) -> None:
        """As upstream's, but there is one map for each block of stages 4 and 5, and their sizes differ."""
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            heads = [width // config.attention_head_dim for width in config.hidden_sizes[3:]]
            positions = [(IMAGE_SIZE // stride) * (IMAGE_SIZE // 2 // stride) for stride in (32, 64)]
            expected = [(self.model_tester.batch_size, h, p, p) for h, p in zip(heads, positions, strict=True)]
            model = model_class._from_config(config, attn_implementation="eager").to(torch_device).eval()
            with torch.no_grad():
                outputs = model(**inputs, output_attentions=True)
            assert [tuple(a.shape) for a in outputs.attentions] == expected
            config.output_attentions = True
            model = model_class._from_config(config, attn_implementation="eager").to(torch_device).eval()
            with torch.no_grad():
                outputs = model(**inputs)
                both = model(**inputs, output_hidden_states=True)
            assert [tuple(a.shape) for a in outputs.attentions] == expected
            assert len(both) == len(outputs) + 1
            assert next(reversed(both)) == "attentions"

    def test_model_get_set_embeddings(self) -> None:
        """As upstream's for vision models: the input embedding is a convolution, and there is no output embedding."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            assert isinstance(model.get_input_embeddings(), torch.nn.Module)
            assert model.get_output_embeddings() is None


@leave_out(*NOT_OF_ENCODERS, *REPEATED)
@without_repeated_skips
class FastViTHDModelTest(FastViTHDModelTests, ModelTesterMixin, unittest.TestCase):
    pass


@leave_out(*NOT_OF_ENCODERS, *REPEATED)
@without_repeated_skips
class FastViTHDModelTrainFormTest(FastViTHDModelTests, ModelTesterMixin, unittest.TestCase):
    make_tester = FastViTHDModelTesterTrainForm


class FastViTHDBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (FastViTHDBackbone,)
    config_class = FastViTHDConfig
    has_attentions = True

    def setUp(self) -> None:
        self.model_tester = FastViTHDModelTester(self)


@only_pipelines("image_feature_extraction")
class FastViTHDPipelineTest(PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {"image-feature-extraction": FastViTHDModel}
