# SPDX-License-Identifier: Apache-2.0
"""The files beside the ONNX graphs: config.json, processor and tokenizer files for transformers.js."""

import shutil
from pathlib import Path
from typing import Any

from ..checkpoint_files import read_json
from ..checkpoints.configs import apple_config, native_processor_files
from ..checkpoints.files import write_json
from ..processing_fastvlm import chat_template_for
from .export_source import Source

__all__ = ["NOT_OF_THE_TOKENIZER", "javascript_template", "write_files"]

NOT_OF_THE_TOKENIZER = ("is_local", "local_files_only", "name_or_path")
"""Fields about the place that a tokenizer was loaded from, which Transformers writes into its files."""
# Expressions of the templates in Python's Jinja, and their equivalents for @huggingface/jinja.
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
    """Write all files except the graphs; config.json is last.

    Args:
        size: height and width of images in pixels.
        external: names of the graphs with external weights.
    """
    template = javascript_template(source.config.text_config.model_type)
    _write_tokenizer(source, out, template)
    processor = native_processor_files(source.config)
    images = _image_processor(source, processor["preprocessor_config.json"], size)
    write_json(out / "preprocessor_config.json", images)
    write_json(out / "processor_config.json", processor["processor_config.json"])
    if (source.directory / "generation_config.json").is_file():
        shutil.copyfile(source.directory / "generation_config.json", out / "generation_config.json")
    write_json(out / "config.json", _config(source, external))


def _write_tokenizer(source: Source, out: Path, template: str) -> None:
    source.processor.tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").unlink(missing_ok=True)
    content = read_json(out / "tokenizer_config.json")
    for key in NOT_OF_THE_TOKENIZER:
        content.pop(key, None)
    content["chat_template"] = template
    write_json(out / "tokenizer_config.json", content)


def _image_processor(source: Source, content: dict[str, Any], size: int) -> dict[str, Any]:
    """Return a configuration that pads images to a black square, or crops them if the checkpoint does.

    transformers.js cannot pad on both sides, but its centre crop of a smaller image does.
    """
    cuts = source.config.image_aspect_ratio == "square"
    edges = {"shortest_edge": size} if cuts else {"shortest_edge": size, "longest_edge": size}
    del content["do_pad"]
    return content | {
        "image_processor_type": "CLIPImageProcessor",
        "size": edges,
        "crop_size": {"height": size, "width": size},
    }


def _config(source: Source, external: dict[str, bool]) -> dict[str, Any]:
    """Return config.json: Apple's flat form for Qwen2, for which transformers.js has a class, and LLaVA's otherwise."""
    config, text = source.config, source.config.text_config
    aspect = "pad" if config.image_aspect_ratio == "anyres" else config.image_aspect_ratio
    if text.model_type == "qwen2":
        content = apple_config(config)
    else:
        text_fields = text.to_dict()
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
