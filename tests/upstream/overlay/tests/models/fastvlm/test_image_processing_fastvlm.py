# SPDX-License-Identifier: Apache-2.0
"""Transformers' tests of image processors, on FastVLM's two."""

import subprocess
import sys
import tempfile
import unittest
from typing import Any

import torch
from PIL import Image

from transformers_fastvlm import FastVLMImageProcessor, FastVLMImageProcessorPil

from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from .tiny import leave_out

CLASSES = {"torchvision": FastVLMImageProcessor, "pil": FastVLMImageProcessorPil}


class FastVLMImageProcessingTester(ImageProcessingTester):
    batch_size = 5
    num_channels = 3
    min_resolution = 30
    max_resolution = 200
    size = {"height": 64, "width": 64}
    do_convert_rgb = True
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
            "do_convert_rgb": self.do_convert_rgb,
            "image_aspect_ratio": "pad",
        }


# That one looks for the processor inside Transformers; test_pil_can_run_without_torchvision is stricter.
@leave_out("test_pil_can_load_without_torchvision")
class FastVLMImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = FastVLMImageProcessingTester
    image_processing_classes = CLASSES
    test_cast_dtype = torch.float16

    def setUp(self) -> None:
        self.image_processor_tester = FastVLMImageProcessingTester(self)
        if "4_channels" in self._testMethodName:
            # Four channels are kept only if no RGB is asked for, which older tests do not do.
            self.image_processor_tester.do_convert_rgb = False

    @property
    def image_processor_dict(self) -> dict[str, Any]:
        return self.image_processor_tester.prepare_image_processor_dict()

    def test_override_instance_attributes_does_not_affect_other_instances(self) -> None:
        """As upstream's, which leaves out processors whose size is not a plain dictionary: all of this version's."""
        for image_processing_class in self.image_processing_classes.values():
            first, second = image_processing_class(), image_processing_class()
            original = (second.size["height"], list(second.image_mean))
            first.size["height"] = -1
            first.image_mean = [-1.0, *first.image_mean[1:]]
            assert (second.size["height"], list(second.image_mean)) == original
            assert image_processing_class().size["height"] == original[0]

    def test_pil_can_run_without_torchvision(self) -> None:
        """As upstream's, without AutoImageProcessor, which itself needs torchvision in older versions."""
        script = """
import sys
sys.modules["torchvision"] = None
import transformers_fastvlm
from PIL import Image
processor = transformers_fastvlm.FastVLMImageProcessorPil.from_pretrained(sys.argv[1])
print(processor(Image.linear_gradient("L"), return_tensors="np").pixel_values.sum())
"""
        image_processor = FastVLMImageProcessorPil(**self.image_processor_dict)
        expected = image_processor(Image.linear_gradient("L"), return_tensors="np").pixel_values.sum()
        with tempfile.TemporaryDirectory() as folder:
            image_processor.save_pretrained(folder)
            result = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout.split()[-1] == str(expected)
