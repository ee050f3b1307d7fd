# SPDX-License-Identifier: Apache-2.0
"""Transformers' tests of multimodal processors, on FastVLM's."""

import unittest
from typing import Any
from unittest.mock import patch

import pytest
from PIL import Image

from transformers_fastvlm import FastVLMProcessor

from ...test_processing_common import ProcessorTesterMixin
from .tiny import image_processor, leave_out, tokenizer


# FastVLM takes images and text; a video is given as images, and there is no sound.
@leave_out("test_*audio*", "test_*feature_extractor*", "test_*video*")
class FastVLMProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = FastVLMProcessor

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return tokenizer()

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return image_processor()

    def prepare_videos_inputs(self, batch_size: int | None = None) -> None:
        """Return no video, which upstream passes to every processor; ours raises for one."""

    prepare_video_inputs = prepare_audio_inputs = prepare_videos_inputs

    def test_processor_text_has_no_visual(self) -> None:
        """As upstream's, which in older versions passes videos to every processor whose signature has them."""

        def call(self: FastVLMProcessor, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
            return original(self, images=images, text=text, **kwargs)

        original = FastVLMProcessor.__call__
        with patch.object(FastVLMProcessor, "__call__", call):
            super().test_processor_text_has_no_visual()

    def test_if_input_has_mismatching_tokens_and_mm_data(self) -> None:
        """As upstream's, which expects its own wording of the error."""
        processor = self.get_processor()
        texts = 3 * ["lower newer <image>"]
        images = 4 * [Image.linear_gradient("L")]
        with pytest.raises(ValueError, match="There are 3 texts, but images has 4 rows"):
            processor(text=texts, images=[[image] for image in images], padding=True)
        with pytest.raises(ValueError, match="image"):
            processor(text=texts, images=images, padding=True)

    def test_apply_chat_template_tool_calls_no_content(self) -> None:
        """As upstream's, which takes a template that names tools, as ours does to refuse them, for one with tools."""
        call = {"type": "function", "function": {"name": "get_weather", "arguments": {}}}
        for answer in ({}, {"content": None}, {"content": ""}):
            with pytest.raises(ValueError, match="has tool_calls; the model was not trained to call tools"):
                self.get_processor().apply_chat_template(
                    [
                        {"role": "user", "content": "What is the weather?"},
                        {"role": "assistant", "tool_calls": [call], **answer},
                    ]
                )
