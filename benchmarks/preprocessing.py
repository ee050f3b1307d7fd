# SPDX-License-Identifier: Apache-2.0
"""From a JPEG of 12 megapixels to pixel values: where the time goes, and batches.

    python benchmarks/preprocessing.py [--width 4000] [--height 3000] [--size 1024] [--repetitions 9] [--threads N]
        [--batches 1 8] [--torchvision] [--note TEXT] [--out benchmarks/results/preprocessing.json]

The image is drawn by `transformers_fastvlm.bench.make_photo`, the same on every machine. The steps are measured in
turns, each by wall and CPU time; compare CPU time on a shared machine. `whole` is the image processor with a path,
`decoded` with an image in memory.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _results
import torch
from PIL import Image, features

from transformers_fastvlm import FastVLMImageProcessorPil
from transformers_fastvlm.bench import photo_jpeg
from transformers_fastvlm.bench.measuring import in_turns


def steps(path: str, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return what is measured, by name."""

    def decode() -> Image.Image:
        with Image.open(path) as image:
            image.load()
            return image

    processors: dict[str, Any] = {"pil": FastVLMImageProcessorPil(size=options.size)}
    if options.torchvision:
        from transformers_fastvlm import FastVLMImageProcessor

        processors["torchvision"] = FastVLMImageProcessor(size=options.size)
    found: dict[str, Callable[[], Any]] = {"decode": decode}
    for name, processor in processors.items():
        found[f"{name}: decoded"] = partial(processor, decode(), return_tensors="pt")
        for batch in options.batches:
            found[f"{name}: whole, batch {batch}"] = partial(processor, [path] * batch, return_tensors="pt")
    return found


def main() -> None:
    parser = _results.parser(__doc__, width=4000, height=3000, size=1024, repetitions=9, threads=None, batches=[1, 8])
    parser.add_argument("--torchvision", action="store_true", help="also the processor that uses torchvision")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        path.write_bytes(photo_jpeg(options.width, options.height))
        size = path.stat().st_size
        work = steps(str(path), options)
        times = in_turns(work, options.repetitions, warmup=2, progress=partial(print, file=sys.stderr, flush=True))
    values = {
        "settings": _results.settings(options),
        "jpeg_bytes": size,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "results": {name: found.spread() for name, found in times.items()},
    }
    _results.write(options, values)


if __name__ == "__main__":
    main()
