# SPDX-License-Identifier: Apache-2.0
"""Transformers' tests of multimodal processors, on FastVLM's."""

import unittest
from typing import Any

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
