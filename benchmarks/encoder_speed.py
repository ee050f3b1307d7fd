# SPDX-License-Identifier: Apache-2.0
"""Time of the encoder at full size: native `fast_vlm` (timm), this package's as loaded, and after fuse().

    python benchmarks/encoder_speed.py --dtype float32 --size 1024 --out benchmarks/results/encoder_speed_float32.json

All three have the same random weights and run in turns in one process on the CPU. With one thread the times are CPU
time, which other processes disturb less, with more threads wall time; both are written. The GEMM rate is measured
between the runs, as the best of float32 and the encoder's dtype. `time_over_products` is the encoder's time divided
by the time of its 487 GFLOP (at 1024 x 1024 pixels; proportional to pixels) at the median of that rate.
`milliseconds_of_operations` is the profile of one more run, for the native model only in float32, since other dtypes
can take minutes. Needs timm.
"""

import copy
import os
from functools import partial
from statistics import median
from typing import Any

import _results
import torch
from torch import nn

from transformers_fastvlm.bench.measuring import in_turns
from transformers_fastvlm.bench.random_weights import encoder_config, native_twin, random_model
from transformers_fastvlm.inference import fuse

# Multiplications and additions of the encoder, counted apart.
FLOP_PER_PIXEL = 487e9 / 1024**2
PRODUCT = (4096, 1536, 1536)


def encoders(dtype: torch.dtype, native: bool) -> dict[str, Any]:
    """Return the encoders by name, all with the same weights."""
    config, cpu = encoder_config(), torch.device("cpu")
    whole: Any = random_model(config, dtype, cpu)
    found = {"default": copy.deepcopy(whole.model.vision_tower), "fused": fuse(whole).model.vision_tower}
    if native:
        other: Any = random_model(native_twin(config), dtype, cpu)
        found["native"] = other.model.vision_tower
    return found


def summary(values: list[float]) -> dict[str, Any]:
    """Return median, least and greatest of the values, and the values."""
    digits = [round(value, 4) for value in values]
    return {"median": round(median(values), 4), "min": min(digits), "max": max(digits), "all": digits}


@torch.inference_mode()
def main() -> None:
    parser = _results.parser(__doc__, dtype="float32", size=1024, batch=1, threads=1, repetitions=5)
    parser.add_argument("--no-native", action="store_true", help="leave the native one out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    subjects = encoders(getattr(torch, options.dtype), native=not options.no_native)
    pixels = torch.rand(options.batch, 3, options.size, options.size).to(getattr(torch, options.dtype))
    work: dict[str, Any] = {name: partial(encoder, pixels) for name, encoder in subjects.items()}
    rows, inner, outer = PRODUCT
    for kind in dict.fromkeys(("float32", options.dtype)):
        left, right = (torch.rand(size, inner, dtype=getattr(torch, kind)) for size in (rows, outer))
        work[f"products {kind}"] = partial(nn.functional.linear, left, right)
    load_before = os.getloadavg()
    times = in_turns(work, options.repetitions, progress=partial(print, flush=True))
    seconds = {name: {"cpu": found.cpu, "wall": found.wall} for name, found in times.items()}
    clock = "cpu" if options.threads == 1 else "wall"
    flop = 2 * rows * inner * outer
    rates = {
        name.split()[1]: [flop / value for value in seconds.pop(name)[clock]]
        for name in work
        if name.startswith("products ")
    }
    medians = {name: median(found[clock]) for name, found in seconds.items()}
    floor = FLOP_PER_PIXEL * pixels[:, 0].numel() / max(map(median, rates.values()))
    outputs = {name: encoder(pixels).last_hidden_state.float() for name, encoder in subjects.items()}
    base = "native" if "native" in outputs else "default"
    values = {
        **_results.settings(options, "no_native", "repetitions"),
        "clock_of_ratios": clock,
        "seconds": {name: {kind: summary(values) for kind, values in found.items()} for name, found in seconds.items()},
        "native_over": {name: round(medians["native"] / medians[name], 3) for name in medians if base == "native"},
        "gflops_of_products": {kind: summary([value / 1e9 for value in found]) for kind, found in rates.items()},
        "time_over_products": {name: round(value / floor, 3) for name, value in medians.items()},
        "difference": {
            name: float(f"{(output - outputs[base]).norm() / outputs[base].norm():.2g}")
            for name, output in outputs.items()
        },
        "difference_to": base,
        "onednn_bfloat16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "milliseconds_of_operations": {
            name: _results.operations(work[name]) for name in subjects if name != "native" or options.dtype == "float32"
        },
        "load_average": {"before": load_before, "after": os.getloadavg()},
    }
    _results.write(options, values)


if __name__ == "__main__":
    main()
