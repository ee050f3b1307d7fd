# SPDX-License-Identifier: Apache-2.0
"""Transformers' tests of multimodal processors, on FastVLM's."""

import functools
import unittest
from typing import Any
from unittest.mock import patch

import pytest
from transformers import AutoImageProcessor

from transformers_fastvlm import FastVLMProcessor

from ...test_processing_common import ProcessorTesterMixin
from .tiny import image_processor, leave_out, tokenizer


# FastVLM takes pictures and text; a video is given as pictures, and there is no sound.
@leave_out("test_*_audio*", "test_*_video*")
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

    def prepare_audio_inputs(self, batch_size: int | None = None) -> None:
        """Return no sound, as above."""

    def test_processor_from_and_save_pretrained_as_nested_dict(self) -> None:
        """As upstream's; the processor loads the Pillow image processor, AutoImageProcessor takes it when told to."""
        load = functools.partial(AutoImageProcessor.from_pretrained, backend="pil")
        with patch.object(AutoImageProcessor, "from_pretrained", load):
            super().test_processor_from_and_save_pretrained_as_nested_dict()

    def test_if_input_has_mismatching_tokens_and_mm_data(self) -> None:
        """As upstream's, which expects its own wording of the error."""
        processor = self.get_processor()
        texts = self.prepare_text_inputs(batch_size=3, modalities=["image"])
        images = self.prepare_images_inputs(batch_size=4)
        with pytest.raises(ValueError, match="There are 3 texts, but images has 4 rows"):
            processor(text=texts, images=[[image] for image in images], padding=True)
        with pytest.raises(ValueError, match="image"):
            processor(text=texts, images=images, padding=True)
