# SPDX-License-Identifier: Apache-2.0
"""What the any-to-any pipeline must do with a model (Transformers' own such file is not distributed)."""

from .test_pipelines_image_text_to_text import ImageTextToTextPipelineTests


class AnyToAnyPipelineTests(ImageTextToTextPipelineTests):
    task = "any-to-any"
