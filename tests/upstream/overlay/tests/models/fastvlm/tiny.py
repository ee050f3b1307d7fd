# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations, processors and saved models for the tests beside this file."""

import contextlib
import fnmatch
import json
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from transformers_fastvlm import (
    FastViTHDConfig,
    FastViTHDModel,
    FastVLMConfig,
    FastVLMForConditionalGeneration,
    FastVLMImageProcessorPil,
    FastVLMProcessor,
)
from transformers_fastvlm.strict_loading import StrictPreTrainedModel

ROOT = Path(__file__).resolve().parents[3]
IMAGE_SIZE = 128
TOKENS_PER_IMAGE = (IMAGE_SIZE // 64) ** 2


def vision_config(**overrides: Any) -> dict[str, Any]:
    """Return the fields of a five-stage encoder with two attention blocks."""
    return {
        "image_size": IMAGE_SIZE,
        "depths": [1, 1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16, 32],
        "attention_head_dim": 8,
        "projection_dim": 16,
        "layer_scale_init_value": 0.1,
    } | overrides


def text_config(model_type: str = "qwen2", **overrides: Any) -> dict[str, Any]:
    """Return the fields of a two-layer language model."""
    return {
        "model_type": model_type,
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    } | overrides


def tokenizer(**overrides: Any) -> Any:
    """Return the golden tokenizer of 480 entries."""
    return AutoTokenizer.from_pretrained(ROOT / "fixtures" / "tokenizer", **overrides)


def image_processor(**overrides: Any) -> FastVLMImageProcessorPil:
    """Return the Pillow image processor, making small squares."""
    return FastVLMImageProcessorPil(**({"size": {"height": 64, "width": 64}} | overrides))


def leave_out(*patterns: str) -> Any:
    """Return a class decorator that drops inherited tests whose subject the classes under test do not have."""

    def decorate(cls: type) -> type:
        for name in dir(cls):
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                setattr(cls, name, None)
        return cls

    return decorate


def only_pipelines(*tasks: str) -> Any:
    """Return a class decorator that drops the inherited tests of all pipelines but those of `tasks`."""
    kept = {f"test_pipeline_{task}{end}" for task in tasks for end in ("", "_fp16")}

    def decorate(cls: type) -> type:
        return leave_out(*(set(fnmatch.filter(dir(cls), "test_pipeline_*")) - kept))(cls)

    return decorate


# Tests that are skipped for a reason that holds for all classes alike; the class for the whole model reports them.
# The last is slow, since it prints every tensor, and tests code that the classes have in common.
REPEATED = (
    "test_eager_matches_batched_and_grouped*",
    "test_encoder_decoder_loss*",
    "test_keep_in_fp32*",
    "test_model_rope_with_partial_rotation",
    "test_moe_models*",
    "test_output_router_logits*",
    "test_resize_position*",
    "test_sdpa_can_dispatch_non_composite_models",
    "test_vision_axial_rope",
    "test_bc_torch_dtype",
)


def without_repeated_skips(cls: type) -> type:
    """Drop the inherited tests that need what this machine lacks; the class for the whole model reports them once."""
    for name in dir(cls):
        test = getattr(cls, name)
        if name.startswith("test_") and (getattr(test, "__unittest_skip__", False) or _has_skip_mark(test)):
            setattr(cls, name, None)
    return cls


def _has_skip_mark(test: Any) -> bool:
    marks: Iterable[Any] = getattr(test, "pytestmark", ())
    return any(mark.name == "skip" or (mark.name == "skipif" and mark.args and mark.args[0] is True) for mark in marks)


def any_weights_load() -> Any:
    """Return a context in which loading is as lenient as Transformers'."""
    lenient = staticmethod(PreTrainedModel._finalize_model_loading)
    return patch.object(StrictPreTrainedModel, "_finalize_model_loading", lenient)


class ModelTests:
    """What all classes of model tests here change of upstream's."""

    @contextlib.contextmanager
    def subTest(self, msg: str | None = None, **parameters: Any) -> Iterator[None]:
        """Run a part of a test as any other statement: reports of 12,000 parts take longer than the tests."""
        try:
            yield
        except Exception as error:
            error.add_note(f"In the part {msg or parameters}.")
            raise

    def test_model_weights_reload_no_missing_tied_weights(self) -> None:
        """As upstream's, but loading weights of another model is an error unless that check is taken out."""
        with pytest.raises(ValueError, match="no tensor of this model"):
            super().test_model_weights_reload_no_missing_tied_weights()  # type: ignore[misc]
        with any_weights_load():
            super().test_model_weights_reload_no_missing_tied_weights()  # type: ignore[misc]

    def test_can_init_all_missing_weights(self) -> None:
        """As upstream's, which skips models whose configuration file has no copyright line, or one of an old year."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "dated.py"
            source.write_text("# Copyright 2025\n", encoding="utf-8")
            with patch("inspect.getfile", return_value=str(source)):
                super().test_can_init_all_missing_weights()  # type: ignore[misc]


def save_tiny_models(folder: Path) -> None:
    """Save what the pipeline tests load, and the index by which they find it."""
    torch.manual_seed(0)
    words = tokenizer(padding_side="left")
    processor = FastVLMProcessor(image_processor=image_processor(), tokenizer=words)
    whole = FastVLMForConditionalGeneration(
        FastVLMConfig(
            vision_config=vision_config(image_size=64),
            text_config=text_config(
                vocab_size=512,
                bos_token_id=None,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            ),
            image_token_id=processor.image_token_id,
        )
    )
    encoder = FastViTHDModel(FastViTHDConfig(**vision_config(image_size=64)))
    for model in (whole, encoder):
        path = folder / model.config.model_type / type(model).__name__
        model.save_pretrained(path)
        processor.save_pretrained(path)
    index = {
        "FastVLMForConditionalGeneration": {
            "tokenizer_classes": [type(words).__name__],
            "processor_classes": ["FastVLMImageProcessorPil"],
        },
        "FastViTHDModel": {"tokenizer_classes": [], "processor_classes": ["FastVLMImageProcessorPil"]},
    }
    (folder / "reports").mkdir(parents=True)
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(index), encoding="utf-8")
