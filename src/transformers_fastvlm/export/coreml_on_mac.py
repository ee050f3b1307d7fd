# SPDX-License-Identifier: Apache-2.0
"""Run the fastvithd.mlpackage beside this file on a Mac, and compare it with the model in PyTorch.

    pip install coremltools
    python check_coreml.py

`check_coreml.npz` holds an image for each size and PyTorch's float32 output for it. The relative error
‖a - b‖ / ‖b‖ of `image_features` should be about 1e-3 or less in float32. Above 5e-2, the limit of float16, the check
fails.
"""

import platform
import sys
import time
from pathlib import Path

LIMIT = 5e-2


def main() -> int:
    """Print the error and the time of each size, and return 1 if an error is too large."""
    if platform.system() != "Darwin":
        print("Core ML runs only on a Mac.", file=sys.stderr)
        return 2
    import coremltools
    import numpy

    directory = Path(__file__).resolve().parent
    samples = numpy.load(directory / "check_coreml.npz")
    model = coremltools.models.MLModel(
        str(directory / "fastvithd.mlpackage"), compute_units=coremltools.ComputeUnit.CPU_AND_GPU
    )
    worst = 0.0
    for name in samples.files:
        if not name.startswith("images_"):
            continue
        size = name.removeprefix("images_")
        images = samples[name].astype(numpy.float32) / 255
        expected = samples[f"image_features_{size}"].astype(numpy.float64)
        model.predict({"images": images})  # the first run compiles
        start = time.perf_counter()
        found = model.predict({"images": images})["image_features"]
        milliseconds = 1000 * (time.perf_counter() - start)
        error = float(numpy.linalg.norm(found - expected) / numpy.linalg.norm(expected))
        worst = max(worst, error if error == error else float("inf"))
        print(f"{size} x {size}: relative error {error:.1e}, {milliseconds:.1f} ms")
    print("as expected" if worst <= LIMIT else f"an error is above {LIMIT}: this package does not match the model")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
