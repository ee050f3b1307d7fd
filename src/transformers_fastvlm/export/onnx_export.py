# SPDX-License-Identifier: Apache-2.0
"""The target `onnx`: a directory that transformers.js and onnxruntime run.

    OUT/config.json, tokenizer files, preprocessor_config.json, processor_config.json
    OUT/onnx/{vision_encoder,embed_tokens,decoder_model_merged}{,_fp16,_quantized,_q4,_q4f16}.onnx

float32, q8 and q4 share one graph of each part; float16 and q4f16 share another with float16 weights. The encoder is
converted for each graph and then freed. The language model keeps its dtype; its weights are converted one by one while
they are written, so memory stays close to the model's size.
"""

import contextlib
import copy
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import FastVLMForConditionalGeneration, FastVLMProcessor
from ..engines.onnx_engine import FILE_SUFFIX, OnnxModel
from ..inference import fuse
from .export_source import Source
from .onnx_files import write_files
from .onnx_graphs import decoder_graph, embedding_graph, save_graph, vision_graph
from .onnx_quantization import quantize
from .programs import Decoder, TokenEmbedding, VisionEncoder
from .reference import relative_error
from .targets import ExportOptions, Report, how_to_run

__all__ = ["write"]

QUANTIZED_BITS = {"q8": 8, "q4": 4, "q4f16": 4}
LARGEST_FLOAT32_ERROR = 1e-4
QUESTION = "Describe the picture."
_NAMES = {torch.float32: "float32", torch.float16: "float16"}
_DTYPE_OF = {"float32": "fp32", "float16": "fp16"}
"""Names of the dtypes in transformers.js."""


def write(source: Source, out: Path, options: ExportOptions) -> Report:
    """Write the directory. See `targets` for the arguments."""
    import onnxruntime

    size = options.sizes[0] if options.sizes else source.image_size
    model = source.model("auto")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{source.directory} is quantized; export the original checkpoint instead.")
    _leave_the_file(model)
    example = _Example(_processor(source, size), model)
    writer = _Writer(out / "onnx", options)
    _write_vision(model, example, writer)
    _give_memory_back()
    _write_text(model, example, writer)
    write_files(source, out, size, writer.external)
    del model
    _give_memory_back()
    errors: dict[str, float] = {}
    for precision in options.precisions:
        options.say(f"checking {precision} in onnxruntime")
        errors |= example.errors(out, precision)
    first = options.precisions[0]
    return Report(
        checked_in=f"onnxruntime {onnxruntime.__version__} on the CPU",
        errors=errors,
        how_to_run=how_to_run("onnx", precision=first, dtype=_DTYPE_OF.get(first, first)),
        limits=tuple(_limits(source)),
        library_name="transformers.js",
    )


def _leave_the_file(model: Any) -> None:
    """Copy the weights from the mapped file, whose pages would stay in memory beside the converted ones."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone()
        for name, buffer in module.named_buffers(recurse=False):
            # A copy, since a view would keep its base tensor in memory.
            setattr(module, name, buffer.clone())


def _limits(source: Source) -> list[str]:
    limits = [
        "transformers.js expands only the first `<image>` of a prompt: for several images write each further "
        "placeholder as often as its image has tokens.",
        "transformers.js does not resize with Pillow's filter, and uses the canvas in browsers: its pixel values "
        "differ a little from this package's.",
    ]
    if source.config.image_aspect_ratio == "anyres":
        limits.append("The checkpoint cuts large images into tiles (AnyRes); these files use one padded square.")
    return limits


def _processor(source: Source, size: int) -> FastVLMProcessor:
    options: dict[str, Any] = {"size": {"height": size, "width": size}}
    if source.config.image_aspect_ratio == "anyres":
        options["image_aspect_ratio"] = "pad"
    return FastVLMProcessor.from_pretrained(source.directory, **options)


class _Writer:
    """Writes the precisions of a graph, and records which files have external weights."""

    def __init__(self, folder: Path, options: ExportOptions) -> None:
        folder.mkdir()
        self.folder, self.options = folder, options
        self.external: dict[str, bool] = {}

    def wants(self, dtype: torch.dtype) -> list[str]:
        """Return the precisions that are made from a graph of this dtype."""
        half = ("float16", "q4f16")
        return [name for name in self.options.precisions if (name in half) == (dtype == torch.float16)]

    def save(self, part: str, graph: Any, dtype: torch.dtype) -> None:
        for precision in self.wants(dtype):
            path = self.folder / f"{part}{FILE_SUFFIX[precision]}.onnx"
            self.options.say(f"writing {path.name}")
            chosen = graph
            if precision in QUANTIZED_BITS:
                chosen = quantize(graph, QUANTIZED_BITS[precision], convolutions=dtype == torch.float32)
            if save_graph(chosen, path, self.options.external_data):
                self.external[path.name] = True


class _Example:
    """An image and a question, with the model's outputs in PyTorch float32."""

    def __init__(self, processor: FastVLMProcessor, model: FastVLMForConditionalGeneration) -> None:
        size = processor.image_processor.size["height"]
        rows, columns = np.mgrid[0:size, 0:size] / size
        stripes = 0.5 + 0.5 * np.sin(40 * rows * columns + 9 * columns)
        image = Image.fromarray((255 * np.stack((rows, columns, stripes), axis=-1)).astype(np.uint8))
        content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        self.pixels, self.ids = inputs["pixel_values"], inputs["input_ids"]
        self.mask = torch.ones_like(self.ids)
        self.features = self.logits = torch.empty(0)
        self.places = self.ids == model.config.image_token_id

    @torch.no_grad()
    def see(self, model: FastVLMForConditionalGeneration) -> None:
        """Store the image features."""
        self.features = VisionEncoder(model).eval()(self.pixels)

    @torch.no_grad()
    def read(self, model: FastVLMForConditionalGeneration) -> None:
        """Store the logits of the prompt; its last token is a separate step."""
        embeds = TokenEmbedding(model).eval()(self.ids)
        embeds[self.places] = self.features.flatten(0, 1)
        positions = torch.arange(self.ids.shape[1])[None]
        decoder = Decoder(model).eval()
        first, past = decoder(embeds[:, :-1], self.mask[:, :-1], positions[:, :-1], [])
        last, _ = decoder(embeds[:, -1:], self.mask, positions[:, -1:], past)
        self.logits = torch.cat((first, last), dim=1)

    def errors(self, out: Path, precision: str) -> dict[str, float]:
        """Run the files of one precision, one part at a time, and compare.

        Raises:
            RuntimeError: the outputs are not finite, or the float32 error is too large.
        """
        runner = OnnxModel(out, precision, prepack=False)
        ids, mask = self.ids.numpy(), self.mask.numpy()
        features = runner.image_features(self.pixels.float().numpy())
        runner.close()
        _give_memory_back()
        embeds = runner.merge(ids, features)
        runner.close()
        _give_memory_back()
        first, past = runner.decode(embeds[:, :-1], mask[:, :-1])
        last, _ = runner.decode(embeds[:, -1:], mask, past)
        runner.close()
        _give_memory_back()
        errors = {
            f"{precision}: image features": relative_error(features, self.features),
            f"{precision}: logits": relative_error(np.concatenate((first, last), axis=1), self.logits),
        }
        worst = max(errors.values())
        if not np.isfinite(worst) or (precision == "float32" and worst > LARGEST_FLOAT32_ERROR):
            raise RuntimeError(f"The {precision} files' outputs differ from the model's: {errors}. Please report it.")
        return errors


def _write_vision(model: Any, example: _Example, writer: _Writer) -> None:
    """Write encoder and projector, and remove both from the model."""
    model.model.vision_tower.float().reparameterize()
    model.model.multi_modal_projector.float()
    example.see(model)
    parts = model.model.vision_tower, model.model.multi_modal_projector
    dtypes = [dtype for dtype in (torch.float32, torch.float16) if writer.wants(dtype)]
    for dtype in dtypes:
        writer.options.say(f"translating the encoder in {_NAMES[dtype]}")
        # Fusing changes the modules, so every dtype but the last gets a copy.
        chosen = parts if dtype == dtypes[-1] else copy.deepcopy(parts)
        model.model.vision_tower, model.model.multi_modal_projector = (part.to(dtype) for part in chosen)
        fuse(model)
        writer.save("vision_encoder", vision_graph(model), dtype)
    model.model.vision_tower = model.model.multi_modal_projector = None


def _write_text(model: Any, example: _Example, writer: _Writer) -> None:
    with _computing_in_float32(model):
        example.read(model)
    _give_memory_back()
    for dtype in (torch.float32, torch.float16):
        if not writer.wants(dtype):
            continue
        writer.options.say(f"translating the language model in {_NAMES[dtype]}")
        writer.save("embed_tokens", embedding_graph(model, dtype), dtype)
        writer.save("decoder_model_merged", decoder_graph(model, dtype), dtype)


@contextlib.contextmanager
def _computing_in_float32(model: Any) -> Iterator[None]:
    """Give each layer of the language model float32 weights while it runs; the head, which sets the dtype, always."""
    head, handles = model.lm_head, []
    narrow: dict[Any, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}

    def widen(module: Any, inputs: Any = None) -> None:
        narrow[module] = [(weight, weight.data) for weight in module.parameters(recurse=False)]
        for weight, data in narrow[module]:
            weight.data = data.float()

    def restore(module: Any, inputs: Any = None, output: Any = None) -> None:
        for weight, data in narrow.pop(module):
            weight.data = data

    widen(head)
    for module in model.model.language_model.modules():
        weights = list(module.parameters(recurse=False))
        if weights and all(weight is not head.weight for weight in weights):
            handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        restore(head)


def _give_memory_back() -> None:
    """Free unused memory. glibc keeps freed memory, here up to half the model's size, until malloc_trim."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
