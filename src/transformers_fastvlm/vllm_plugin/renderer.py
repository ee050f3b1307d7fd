# SPDX-License-Identifier: Apache-2.0
"""vLLM's prompt renderer, with a check that a prompt has one placeholder for each image.

vLLM answers a prompt with too many placeholders as if there were an image, and fails with an internal error if one is
missing. Any client can cause both by writing "<image>".
"""

from collections.abc import Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from ..tokens import IMAGE_TOKEN

__all__ = ["FastVLMRenderer"]


class FastVLMRenderer(HfRenderer):
    """vLLM's renderer for Hugging Face checkpoints; it refuses prompts whose placeholders do not match their images."""

    def process_for_engine(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the engine's input for a prompt of token ids, or raise `VLLMValidationError`."""
        self._check_places(prompt)
        return super().process_for_engine(prompt, *args, **kwargs)

    async def process_for_engine_async(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the engine's input for a prompt of token ids, or raise `VLLMValidationError`."""
        self._check_places(prompt)
        return await super().process_for_engine_async(prompt, *args, **kwargs)

    def _check_places(self, prompt: Mapping[str, Any]) -> None:
        if "prompt_token_ids" not in prompt:  # embeddings, where they are allowed
            return
        places = list(prompt["prompt_token_ids"]).count(self.model_config.hf_config.image_token_id)
        data, images = prompt.get("multi_modal_data"), 0
        if data:
            images = self.get_mm_processor().info.parse_mm_data(data).get_count("image", strict=False)
        if places != images:
            raise VLLMValidationError(
                f"The prompt has {places} {IMAGE_TOKEN}, but {images} images were given. Write one placeholder for "
                f"each image; in chat messages the template writes them. If {IMAGE_TOKEN} is meant literally, write it "
                "otherwise, such as < image >."
            )
