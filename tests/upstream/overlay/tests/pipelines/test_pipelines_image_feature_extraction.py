# SPDX-License-Identifier: Apache-2.0
"""What the image-feature-extraction pipeline must do with a model (Transformers' own such file is not distributed)."""

from typing import Any

import torch
from transformers import pipeline

from .test_pipelines_image_text_to_text import IMAGE


class ImageFeatureExtractionPipelineTests:
    def get_test_pipeline(
        self, model: Any, tokenizer: Any, image_processor: Any = None, dtype: str = "float32", **_: Any
    ) -> tuple[Any, list[Any]]:
        """Return the pipeline and its examples."""
        model = model.to(getattr(torch, dtype))
        return pipeline("image-feature-extraction", model=model, image_processor=image_processor), [IMAGE]

    def run_pipeline_test(self, pipe: Any, examples: list[Any]) -> None:
        """Take the map of features and the pooled vector."""
        config = pipe.model.config
        features = torch.tensor(pipe(examples[0]))
        assert features.shape == (1, config.num_features, 1, 1)
        pooled = torch.tensor(pipe(examples[0], pool=True))
        assert pooled.shape == (1, config.projection_dim)
