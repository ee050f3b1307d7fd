# SPDX-License-Identifier: Apache-2.0
"""What stands beside the ONNX graphs: config.json, processor and tokenizer files as transformers.js reads them."""

import shutil
from pathlib import Path
from typing import Any

from ..checkpoints.configs import apple_config
from ..checkpoints.files import read_json, write_json
from ..processing_fastvlm import chat_template_for
from ..tokens import IMAGE_TOKEN
from .source import Source

__all__ = ["javascript_template", "write_files"]

_BICUBIC = 3
# What the templates say in Jinja's Python dialect, and how @huggingface/jinja takes it.
_DIALECT = (
    ("\\U000f0000", "\U000f0000"),
    ("turn.text.count('<image>') == 1", "(turn.text.split('<image>') | length) == 2"),
)


def javascript_template(text_model_type: str) -> str:
    """Return the chat template of a text model in the dialect of transformers.js; both render the same."""
    template = chat_template_for(text_model_type)
    for ours, theirs in _DIALECT:
        if ours not in template:
            raise RuntimeError(f"The chat template of {text_model_type!r} no longer has {ours!r}.")
        template = template.replace(ours, theirs)
    return template


def write_files(source: Source, out: Path, size: int, external: dict[str, bool]) -> None:
    """Write everything but the graphs; config.json last.

    Args:
        size: height and width of pictures in pixels.
        external: names of the graphs whose weights are in a file of their own.
    """
    template = javascript_template(source.config.text_config.model_type)  # type: ignore[union-attr]
    _write_tokenizer(source, out, template)
    write_json(out / "preprocessor_config.json", _image_processor(source, size))
    write_json(out / "processor_config.json", _processor(source))
    if (source.directory / "generation_config.json").is_file():
        shutil.copyfile(source.directory / "generation_config.json", out / "generation_config.json")
    write_json(out / "config.json", _config(source, external))


def _write_tokenizer(source: Source, out: Path, template: str) -> None:
    source.processor.tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").unlink(missing_ok=True)
    content = read_json(out / "tokenizer_config.json")
    content["chat_template"] = template
    write_json(out / "tokenizer_config.json", content)


def _image_processor(source: Source, size: int) -> dict[str, Any]:
    """Make a square of the given size: by black borders, or by cutting for a checkpoint of that kind.

    transformers.js has no padding in the middle, but its centre crop of a smaller picture is one.
    """
    cuts = source.config.image_aspect_ratio == "square"
    edges = {"shortest_edge": size} if cuts else {"shortest_edge": size, "longest_edge": size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": edges,
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    }


def _processor(source: Source) -> dict[str, Any]:
    vision: Any = source.config.vision_config
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 0,
        "patch_size": vision.stride,
        "vision_feature_select_strategy": "full",
    }


def _config(source: Source, external: dict[str, bool]) -> dict[str, Any]:
    """Return config.json: Apple's flat one for Qwen2, which transformers.js has a class for, and else LLaVA's."""
    config, text = source.config, source.config.text_config
    aspect = "pad" if config.image_aspect_ratio == "anyres" else config.image_aspect_ratio
    if text.model_type == "qwen2":  # type: ignore[union-attr]
        content = apple_config(config)
    else:
        text_fields = text.to_dict()  # type: ignore[union-attr]
        content = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "eos_token_id": text_fields.get("eos_token_id"),
            "text_config": text_fields,
            "tie_word_embeddings": config.tie_word_embeddings,
        }
    content |= {
        "image_aspect_ratio": aspect,
        "image_grid_pinpoints": None,
        "image_token_index": config.image_token_id,
        "transformers.js_config": {"use_external_data_format": external or False},
    }
    return content
