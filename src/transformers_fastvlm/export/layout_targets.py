# SPDX-License-Identifier: Apache-2.0
"""The targets `apple` and `native`: whole checkpoints for Apple's scripts and for Transformers' own `fast_vlm`.

`checkpoints.convert` writes both. This module adds a merged encoder, generation settings with stop tokens, a chat
template that places images, and the checks after writing.
"""

import fnmatch
import importlib.metadata
import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch

from ..checkpoints import Layout, convert
from ..checkpoints.checkpoint_source import read_checkpoint
from ..checkpoints.conversion import DROPPED_FILES, DROPPED_FROM
from ..processing_fastvlm import chat_template_for
from .export_source import Source
from .reference import Reference, merged_model, reference, relative_error
from .targets import ExportOptions, Report, how_to_run

__all__ = ["write_apple", "write_native"]

_SQUARE = "Images are padded to a black square, as in training."
_TEMPLATE_FILES = ("chat_template.json", "chat_template.jinja")


def write_apple(source: Source, out: Path, options: ExportOptions) -> Report:
    """Write Apple's layout: flat config.json, Apple's tensor names, no processor files. See `targets`."""
    notes = _convert(source, out, "apple", options)
    return Report(
        checked_in=None,
        errors={},
        how_to_run=how_to_run("apple"),
        limits=tuple(_apple_limits(source)),
        notes=(*notes, "The files were read back, but not run in Apple's scripts."),
        library_name="ml-fastvlm",
    )


def write_native(source: Source, out: Path, options: ExportOptions) -> Report:
    """Write the layout of Transformers' own `fast_vlm`, which loads without this package. See `targets`."""
    notes = _convert(source, out, "native", options)
    source.model("auto").generation_config.save_pretrained(out)
    for name in _TEMPLATE_FILES:
        (out / name).unlink(missing_ok=True)
    (out / "chat_template.jinja").write_text(chat_template_for(source.config.text_config.model_type), encoding="utf-8")
    errors: dict[str, float] = {}
    checked_in = None
    if importlib.util.find_spec("timm") is None:
        notes.append("The files were not run: fast_vlm needs timm. With `pip install timm`, the export checks them.")
    else:
        options.say("running the files in Transformers' fast_vlm")
        errors = _native_errors(out, reference(source))
        checked_in = (
            f"Transformers {importlib.metadata.version('transformers')} with timm {importlib.metadata.version('timm')}"
        )
    return Report(
        checked_in=checked_in,
        errors=errors,
        how_to_run=how_to_run("native"),
        limits=tuple(_native_limits(source)),
        notes=tuple(notes),
        library_name="transformers",
    )


def _convert(source: Source, out: Path, layout: Layout, options: ExportOptions) -> list[str]:
    """Convert into `out` with a merged encoder, read the result back, and return the conversion's notes."""
    with tempfile.TemporaryDirectory(dir=out, prefix="converting-") as folder:
        directory = source.directory
        if not source.config.vision_config.reparameterized:
            options.say("merging the branches of the encoder's train-time form")
            directory = _merged(source, Path(folder) / "merged", layout)
        options.say("writing the tensors")
        done = convert(directory, Path(folder) / "converted", layout)
        read_checkpoint(done.directory)
        for path in sorted(done.directory.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
            path.rename(out / path.name)
    return [note[0].upper() + note[1:] + "." for note in done.notes]


def _merged(source: Source, out: Path, layout: Layout) -> Path:
    """Save the model with a merged encoder, and copy the checkpoint's other files that `convert` keeps."""
    merged_model(source, "auto").save_pretrained(out)
    dropped = DROPPED_FILES | (DROPPED_FROM[source.layout] if layout != source.layout else {})
    for path in source.directory.iterdir():
        is_dropped = any(fnmatch.fnmatch(path.name, pattern) for pattern in dropped)
        if path.is_file() and not is_dropped and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)
    return out


@torch.no_grad()
def _native_errors(directory: Path, expected: Reference) -> dict[str, float]:
    """Run the directory in Transformers' `fast_vlm` and compare."""
    from transformers import FastVlmForConditionalGeneration

    model, info = FastVlmForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if wrong:
        raise ValueError(f"Transformers' fast_vlm does not load {len(wrong)} tensors of the export: {wrong[:5]}.")
    model.eval()
    features = model.get_image_features(pixel_values=expected.pixel_values).pooler_output
    inputs = {"input_ids": torch.tensor([expected.input_ids]), "pixel_values": expected.pixel_values}
    errors = {
        "float32: image features": relative_error(features[0], expected.features[0]),
        "float32: logits": relative_error(model(**inputs).logits[0], expected.logits),
    }
    answer = model.generate(**inputs, do_sample=False, temperature=None, max_new_tokens=len(expected.answer))
    if tuple(answer[0, len(expected.input_ids) :].tolist()) != expected.answer:
        raise ValueError(f"Transformers' fast_vlm answers differently from this package; relative errors {errors}.")
    return errors


def _apple_limits(source: Source) -> list[str]:
    limits = [
        "Apple's scripts take one image for each question and need `llava` from github.com/apple/ml-fastvlm.",
        "The tokenizer has no <image>: Apple's scripts use the id -200 as the placeholder.",
    ]
    if not source.has_published_encoder:
        limits.append(
            "The encoder does not have the published size. Apple's code always builds the published encoder and cannot "
            "load this model; this package can."
        )
    return limits


def _native_limits(source: Source) -> list[str]:
    limits = [
        f'{_SQUARE} With `backend="pil"` the pixels equal those of this package; otherwise torchvision resizes, and '
        "values may differ by 2 of 255.",
        "chat_template.jinja is this package's chat template: it takes strings or lists of parts as content, and "
        "moves a single image of a turn before the text, as in training.",
        'Transformers pads batches on the right by default: pass `padding_side="left"` for generation.',
    ]
    if source.config.image_aspect_ratio == "anyres":
        limits.append("There is no AnyRes: each image is padded to a square and encoded once, without tiles.")
    if source.config.image_aspect_ratio == "square":
        limits[0] = limits[0].replace(_SQUARE, "Images are cropped to their centred square, as in the checkpoint.")
    return limits
