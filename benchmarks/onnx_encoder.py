# SPDX-License-Identifier: Apache-2.0
"""Encoder and projector in onnxruntime compared with this package in PyTorch (fused), in float32 on the CPU.

    python benchmarks/onnx_encoder.py [--size 1024] [--batch 1] [--repetitions 9] [--threads N]
        [--note TEXT] [--out benchmarks/results/onnx_encoder.json]

The published encoder's shape with random weights and the 0.5B size's projector. Both get the same number of threads
and are measured in turns.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _results
import numpy as np
import torch

from transformers_fastvlm.bench.measuring import in_turns, ratio, spread
from transformers_fastvlm.bench.random_weights import encoder_config, random_model
from transformers_fastvlm.export.onnx_graphs import save_graph, vision_graph
from transformers_fastvlm.inference import fuse


def subjects(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return what is measured, and how far the two are apart."""
    import onnxruntime

    model: Any = fuse(random_model(encoder_config(), torch.float32, torch.device("cpu")))
    save_graph(vision_graph(model), folder / "vision_encoder.onnx", None)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(
        str(folder / "vision_encoder.onnx"), settings, providers=["CPUExecutionProvider"]
    )
    pixels = torch.rand((options.batch, 3, options.size, options.size), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def pytorch() -> np.ndarray:
        return model.get_image_features(pixels).pooler_output.numpy()

    def runtime() -> np.ndarray:
        return session.run(None, {"pixel_values": pixels.numpy()})[0]

    expected = pytorch()
    error = float(np.linalg.norm(runtime() - expected) / np.linalg.norm(expected))
    return {"pytorch": pytorch, "onnxruntime": runtime}, error


def main() -> None:
    options = _results.parser(__doc__, size=1024, batch=1, repetitions=9, threads=None).parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work, error = subjects(Path(folder), options)
        times = in_turns(work, options.repetitions, warmup=2, progress=partial(print, file=sys.stderr, flush=True))
    results = {name: spread(found.wall) for name, found in times.items()}
    values = {
        "settings": _results.settings(options),
        "relative_error": error,
        "results": results,
        "onnxruntime_to_pytorch": ratio(results["onnxruntime"]["median"], results["pytorch"]["median"]),
    }
    _results.write(options, values, packages=["onnxruntime"])


if __name__ == "__main__":
    main()
