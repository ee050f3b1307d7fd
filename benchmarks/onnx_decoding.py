# SPDX-License-Identifier: Apache-2.0
"""Decoding and the first token of the ONNX decoder, compared with the graphs that earlier versions wrote.

    python benchmarks/onnx_decoding.py [--preset 0.5b] [--precisions q4 q8 q4f16] [--prompt-tokens 276] [--steps 3]
        [--repetitions 5] [--threads 1] [--layers N] [--out benchmarks/results/onnx_decoding.json]

Random weights of the preset's shape. The earlier graphs have no `accuracy_level`, so onnxruntime does not round the
activations of a multiplication to 8 bits, and no `num_logits_to_keep`, so the head multiplies all positions. Their
attention is PyTorch's translation, and their norms multiply by inverse roots. Both run in turns through `OnnxModel`, as
the engine `onnx` does: "first_token" is a prompt of random embeddings, without the image encoder; "decoding" is one
token after it. Compare the CPU seconds; they are of a whole turn of `--steps` tokens divided by their number.
`relative_error` is the distance of the first logits from the earlier graph's.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import _results
import numpy as np
import torch

from transformers_fastvlm import FastVLMConfig
from transformers_fastvlm.bench.measuring import in_turns, ratio, spread
from transformers_fastvlm.bench.random_weights import random_model
from transformers_fastvlm.engines.onnx_engine import FILE_SUFFIX, OnnxModel
from transformers_fastvlm.export.onnx_graphs import decoder_graph, save_graph
from transformers_fastvlm.export.onnx_quantization import quantize

BITS = {"q4": 4, "q8": 8, "q4f16": 4}
VERSIONS = ("earlier", "today")


def as_earlier(graph: Any) -> Any:
    """Return a decoder's graph as it was written before."""
    import onnx_ir as ir

    for node in graph.graph:
        node.attributes.pop("accuracy_level", None)
    count = next(value for value in graph.graph.inputs if value.name == "num_logits_to_keep")
    graph.graph.inputs.remove(count)
    count.const_value = ir.tensor(0, dtype=ir.DataType.INT64, name=count.name)
    graph.graph.register_initializer(count)
    return graph


def earlier_decoder_graph(model: Any, dtype: torch.dtype) -> Any:
    """Return a decoder's graph with the attention and the norms of earlier versions."""
    package = "transformers_fastvlm.export"
    with (
        patch(f"{package}.programs.grouped_attention", lambda model: nullcontext()),
        patch(f"{package}.onnx_graphs._divide_by_roots", lambda graph: None),
    ):
        return decoder_graph(model, dtype)


def write_graphs(folder: Path, config: Any, precisions: list[str]) -> None:
    """Write each precision's decoder as it is today and as it was, to one directory of each version."""
    model: Any = random_model(config, torch.float32, torch.device("cpu"))
    model.model.vision_tower = model.model.multi_modal_projector = None
    for dtype in (torch.float32, torch.float16):
        wanted = [name for name in precisions if name.endswith("f16") == (dtype == torch.float16)]
        for version in VERSIONS if wanted else ():
            graph = (earlier_decoder_graph if version == "earlier" else decoder_graph)(model, dtype)
            for name in wanted:
                chosen = quantize(graph, BITS[name], convolutions=False)
                file = folder / version / "onnx" / f"decoder_model_merged{FILE_SUFFIX[name]}.onnx"
                file.parent.mkdir(parents=True, exist_ok=True)
                save_graph(as_earlier(chosen) if version == "earlier" else chosen, file, None)
                print(f"{version}: {file.name}", file=sys.stderr, flush=True)


class Decoder:
    """One version's graph, after a prompt."""

    def __init__(self, directory: Path, precision: str, width: int, options: Any) -> None:
        self.model = OnnxModel(directory, precision, threads=options.threads)
        values = np.random.default_rng(0).standard_normal((1, options.prompt_tokens + 1, width))
        embeds = (0.05 * values).astype(np.float32)
        self.prompt, self.token, self.steps = embeds[:, :-1], embeds[:, -1:], options.steps
        self.logits, self.past = self._run(self.prompt, 0, None)

    def _run(self, embeds: np.ndarray, before: int, past: Any) -> tuple[np.ndarray, Any]:
        mask = np.ones((1, before + embeds.shape[1]), dtype=np.int64)
        return self.model.decode(embeds, mask, past, logits_to_keep=1)

    def first(self) -> None:
        """Read the prompt."""
        self._run(self.prompt, 0, None)

    def decode(self) -> None:
        """Decode some tokens after the prompt."""
        past = self.past
        for step in range(self.steps):
            _, past = self._run(self.token, self.prompt.shape[1] + step, past)


def measure(folder: Path, precision: str, width: int, options: Any) -> dict[str, Any]:
    """Return the seconds of both versions of a precision, and how many times the earlier ones are today's."""
    decoders = {version: Decoder(folder / version, precision, width, options) for version in VERSIONS}
    error = np.linalg.norm(decoders["today"].logits - decoders["earlier"].logits)
    found: dict[str, Any] = {"relative_error": float(error / np.linalg.norm(decoders["earlier"].logits))}
    for name, tokens in (("first_token", 1), ("decoding", options.steps)):
        work: dict[str, Callable[[], Any]] = {
            version: one.first if name == "first_token" else one.decode for version, one in decoders.items()
        }
        say = partial(print, f"{precision}, {name}:", file=sys.stderr, flush=True)
        times = in_turns(work, options.repetitions, progress=say)
        own = {
            version: {
                "seconds": spread([value / tokens for value in one.wall]),
                "processor_seconds": spread([value / tokens for value in one.cpu]),
            }
            for version, one in times.items()
        }
        medians = {version: one["processor_seconds"]["median"] for version, one in own.items()}
        found[name] = {**own, "earlier_to_today": ratio(medians["earlier"], medians["today"])}
    return found


def main() -> None:
    parser = _results.parser(__doc__, preset="0.5b", prompt_tokens=276, steps=3, repetitions=5, threads=1)
    parser.add_argument("--layers", type=int, help="layers of the language model, if not the preset's")
    parser.add_argument("--precisions", nargs="+", choices=BITS, default=list(BITS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config: Any = FastVLMConfig.from_preset(options.preset)
    if options.layers:
        config.text_config.num_hidden_layers = options.layers
        config.text_config.layer_types = config.text_config.layer_types[: options.layers]
    with tempfile.TemporaryDirectory() as name:
        write_graphs(Path(name), config, options.precisions)
        width = config.text_config.hidden_size
        results = {precision: measure(Path(name), precision, width, options) for precision in options.precisions}
    values = {"settings": _results.settings(options), "results": results}
    _results.write(options, values, packages=["onnxruntime", "onnxscript"])


if __name__ == "__main__":
    main()
