# SPDX-License-Identifier: Apache-2.0
"""From a JPEG of 12 megapixels to pixel values: where the time goes, and batches.

    python benchmarks/preprocessing.py [--width 4000] [--height 3000] [--size 1024] [--repetitions 9] [--threads N]
        [--batches 1 8] [--torchvision] [--note TEXT] [--out benchmarks/results/preprocessing.json]

The picture is drawn by `transformers_fastvlm.bench.make_photo`, the same on every machine. The steps are
measured in turns, each by wall and by processor time; on a machine that others use too, processor time is the one to
look at. `whole` is what the image processor does with a path, `decoded` with a picture that is in memory already.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _results
import torch
from PIL import Image, features

from transformers_fastvlm import FastVLMImageProcessorPil
from transformers_fastvlm.bench import photo_jpeg
from transformers_fastvlm.bench.measuring import spread

WARMUP = 2


def main() -> None:
    parser = _results.parser(__doc__)
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--size", type=int, default=1024, help="height and width of the pixel values")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, for torchvision's resizing")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--torchvision", action="store_true", help="also the processor that uses torchvision")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        path.write_bytes(photo_jpeg(options.width, options.height))
        size = path.stat().st_size
        results = measure(steps(str(path), options), options.repetitions)
    values = {
        "settings": {key: value for key, value in vars(options).items() if key not in ("out", "note")},
        "jpeg_bytes": size,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "results": results,
    }
    _results.write(options, values)


def steps(path: str, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return what is measured, by name."""

    def decode() -> Image.Image:
        with Image.open(path) as image:
            image.load()
            return image

    decoded = decode()
    processors: dict[str, Any] = {"pil": FastVLMImageProcessorPil(size=options.size)}
    if options.torchvision:
        from transformers_fastvlm import FastVLMImageProcessor

        processors["torchvision"] = FastVLMImageProcessor(size=options.size)
    found: dict[str, Callable[[], Any]] = {"decode": decode}
    for name, processor in processors.items():
        found[f"{name}: decoded"] = lambda processor=processor: processor(decoded, return_tensors="pt")
        for batch in options.batches:
            pictures = [path] * batch
            found[f"{name}: whole, batch {batch}"] = lambda processor=processor, pictures=pictures: processor(
                pictures, return_tensors="pt"
            )
    return found


def measure(work: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, Any]:
    """Run everything in turns and return the spread of each one's seconds."""
    wall: dict[str, list[float]] = {name: [] for name in work}
    processor: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(WARMUP + repetitions):
        for name, step in work.items():
            start = time.perf_counter(), time.process_time()
            step()
            end = time.perf_counter(), time.process_time()
            if turn >= WARMUP:
                wall[name].append(end[0] - start[0])
                processor[name].append(end[1] - start[1])
        print(f"turn {turn + 1} of {WARMUP + repetitions}", file=sys.stderr, flush=True)
    return {name: {"seconds": spread(wall[name]), "processor_seconds": spread(processor[name])} for name in work}


if __name__ == "__main__":
    main()
