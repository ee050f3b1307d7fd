# SPDX-License-Identifier: Apache-2.0
"""Transformers' tests of image processors, on FastVLM's two."""

import unittest
from typing import Any

import torch

from transformers_fastvlm import FastVLMImageProcessor, FastVLMImageProcessorPil

from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

CLASSES = {"torchvision": FastVLMImageProcessor, "pil": FastVLMImageProcessorPil}


class FastVLMImageProcessingTester(ImageProcessingTester):
    batch_size = 5
    num_channels = 3
    min_resolution = 30
    max_resolution = 200
    size = {"height": 64, "width": 64}
    image_processing_classes = CLASSES

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return {
            "do_resize": True,
            "size": dict(self.size),
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": [0.0, 0.0, 0.0],
            "image_std": [1.0, 1.0, 1.0],
            "do_convert_rgb": True,
            "image_aspect_ratio": "pad",
        }


class FastVLMImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = FastVLMImageProcessingTester
    image_processing_classes = CLASSES
    test_cast_dtype = torch.float16

    def setUp(self) -> None:
        self.image_processor_tester = FastVLMImageProcessingTester(self)

    @property
    def image_processor_dict(self) -> dict[str, Any]:
        return self.image_processor_tester.prepare_image_processor_dict()
