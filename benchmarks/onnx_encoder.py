# SPDX-License-Identifier: Apache-2.0
"""The encoder with its projector in onnxruntime beside PyTorch (this package's, fused), float32, on the CPU.

    python benchmarks/onnx_encoder.py [--size 1024] [--batch 1] [--repetitions 9] [--threads N]
        [--note TEXT] [--out benchmarks/results/onnx_encoder.json]

The published encoder's shape with random weights and the 0.5B size's projector. Both get the same number of threads
and are measured in turns.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers_fastvlm.bench.machine import machine, versions

from transformers_fastvlm import FastVLMConfig
from transformers_fastvlm.bench.measuring import spread
from transformers_fastvlm.bench.random_weights import random_model
from transformers_fastvlm.export.onnx_graphs import save_graph, vision_graph
from transformers_fastvlm.inference import fuse

WARMUP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="height and width of the pictures")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--note", help="what else one should know, for the record")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as folder:
        work, error = subjects(Path(folder), options)
        results = measure(work, options.repetitions)
    import onnxruntime

    record = {
        "settings": {key: value for key, value in vars(options).items() if key not in ("out", "note")},
        "note": options.note,
        "machine": machine(torch.device("cpu")),
        "versions": versions() | {"onnxruntime": onnxruntime.__version__},
        "relative_error": error,
        "results": results,
        "onnxruntime_to_pytorch": results["onnxruntime"]["median"] / results["pytorch"]["median"],
    }
    text = json.dumps(record, indent=2) + "\n"
    if options.out:
        options.out.write_text(text)
    print(text, end="")


def subjects(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return what is measured, and how far the two are apart."""
    import onnxruntime

    config = FastVLMConfig.from_preset("0.5b")
    config.text_config.num_hidden_layers = 1
    config.text_config.vocab_size, config.text_config.pad_token_id = 64, None
    model: Any = fuse(random_model(config, torch.float32, torch.device("cpu")))
    save_graph(vision_graph(model), folder / "vision_encoder.onnx", None)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(
        str(folder / "vision_encoder.onnx"), settings, providers=["CPUExecutionProvider"]
    )
    pixels = torch.rand((options.batch, 3, options.size, options.size), generator=torch.Generator().manual_seed(0))
    feed = {"pixel_values": pixels.numpy()}

    @torch.inference_mode()
    def pytorch() -> np.ndarray:
        return model.get_image_features(pixels).pooler_output.numpy()

    def runtime() -> np.ndarray:
        return session.run(None, feed)[0]

    expected = pytorch()
    error = float(np.linalg.norm(runtime() - expected) / np.linalg.norm(expected))
    return {"pytorch": pytorch, "onnxruntime": runtime}, error


def measure(work: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, Any]:
    """Run both in turns and return the spread of each one's seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(WARMUP + repetitions):
        for name, step in work.items():
            start = time.perf_counter()
            step()
            if turn >= WARMUP:
                seconds[name].append(time.perf_counter() - start)
        print(f"turn {turn + 1} of {WARMUP + repetitions}", file=sys.stderr, flush=True)
    return {name: spread(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
