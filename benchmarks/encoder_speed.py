# SPDX-License-Identifier: Apache-2.0
"""Time of the encoder at full size: native `fast_vlm` (timm), this package's as loaded, and after fuse().

    python benchmarks/encoder_speed.py --dtype float32 --size 1024 --out benchmarks/results/encoder_speed_float32.json

All three have the same random weights, on which speed does not depend, and run in turn in one process on the CPU.
Times are of the process's own CPU time with one thread, so that other processes disturb them less, and of the wall
clock with more; both are written. The rate of matrix products is measured between the runs, as the best of float32 and
the encoder's type. `time_over_products` is the encoder's time divided by the time of its 487 GFLOP (at 1024 x 1024
pixels; proportional to pixels) at the median of that rate. `milliseconds_of_operations` says what one more run of each
spent its time on; the native one's only in float32, since in the other types it can take minutes. Needs timm.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import _results
import torch
from torch import Tensor, nn

# Multiplications and additions of the encoder, counted apart.
FLOP_PER_PIXEL = 487e9 / 1024**2
PRODUCT = (4096, 1536, 1536)


def native_encoder(ours: nn.Module) -> nn.Module:
    """Return Transformers' own encoder of FastVLM with the weights of `ours`."""
    from transformers import AutoModel
    from transformers.models.fast_vlm import FastVlmConfig

    from transformers_fastvlm.checkpoints.native import to_native_name

    config = FastVlmConfig().vision_config
    config.model_args = {"inference_mode": True}
    model = AutoModel.from_config(config)
    names = {name: to_native_name(f"model.vision_tower.{name}") for name in ours.state_dict()}
    tensors = {
        new.removeprefix("model.vision_tower."): ours.state_dict()[old] for old, new in names.items() if new is not None
    }
    model.load_state_dict(tensors)
    return model


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return the process's CPU seconds, the clock's seconds and the result of a run."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def summary(values: list[float]) -> dict[str, Any]:
    """Return median, least and greatest of the values, and the values."""
    digits = [round(value, 4) for value in values]
    return {"median": round(statistics.median(values), 4), "min": min(digits), "max": max(digits), "all": digits}


def parse() -> argparse.Namespace:
    parser = _results.parser(__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--size", type=int, default=1024, help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--native-repetitions", type=int, help="default: as many as the others; 0 leaves it out")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parse()
    from transformers_fastvlm import FastViTHDConfig, FastViTHDModel
    from transformers_fastvlm.inference import fuse

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    repetitions, native = arguments.repetitions, arguments.native_repetitions
    native = repetitions if native is None else native
    default = FastViTHDModel(FastViTHDConfig(layer_scale_init_value=0.1)).eval().to(dtype)
    encoders: dict[str, nn.Module] = {"default": default, "fused": fuse(copy.deepcopy(default))}
    if native:
        encoders["native"] = native_encoder(default).eval().to(dtype)
    pixels = torch.rand(arguments.batch, 3, arguments.size, arguments.size).to(dtype)
    small = pixels[..., :128, :128]
    for encoder in encoders.values():
        encoder(small)

    def rate(of: torch.dtype) -> float:
        rows, inner, outer = PRODUCT
        a, b = torch.rand(rows, inner, dtype=of), torch.rand(outer, inner, dtype=of)
        cpu, wall, _ = timed(lambda: nn.functional.linear(a, b))
        return 2 * rows * inner * outer / (cpu if arguments.threads == 1 else wall)

    times: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in encoders}
    rates: dict[str, list[float]] = {"float32": [], arguments.dtype: []}
    outputs: dict[str, Tensor] = {}
    load_before = os.getloadavg()
    names = list(encoders)
    for turn in range(max(repetitions, native)):
        first = turn % len(names)  # none is always the first of a turn
        for name in names[first:] + names[:first]:
            encoder = encoders[name]
            for of, measured in rates.items():
                if of == "float32" or not measured or len(measured) < 3:
                    measured.append(rate(getattr(torch, of)))
            if turn >= (native if name == "native" else repetitions):
                continue
            cpu, wall, output = timed(lambda encoder=encoder: encoder(pixels))
            times[name]["cpu"].append(cpu)
            times[name]["wall"].append(wall)
            outputs[name] = output.last_hidden_state.float()
            print(f"{name}: {cpu:.2f} s of CPU time, {wall:.2f} s", flush=True)
    clock = "cpu" if arguments.threads == 1 else "wall"
    median = {name: statistics.median(values[clock]) for name, values in times.items()}
    flops = max(statistics.median(values) for values in rates.values())
    floor = FLOP_PER_PIXEL * pixels[:, 0].numel() / flops
    reference = outputs.get("native", outputs["default"])
    values = {
        "dtype": arguments.dtype,
        "size": arguments.size,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "clock_of_ratios": clock,
        "seconds": {
            name: {kind: summary(measured) for kind, measured in values.items()} for name, values in times.items()
        },
        "native_over": {n: round(median["native"] / median[n], 3) for n in ("default", "fused") if native},
        "gflops_of_products": {of: summary([value / 1e9 for value in values]) for of, values in rates.items()},
        "time_over_products": {name: round(value / floor, 3) for name, value in median.items()},
        "difference": {
            name: float(f"{(output - reference).norm() / reference.norm():.2g}") for name, output in outputs.items()
        },
        "difference_to": "native" if native else "default",
        "onednn_bfloat16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "milliseconds_of_operations": {
            name: _results.operations(lambda encoder=encoder: encoder(pixels))
            for name, encoder in encoders.items()
            if name != "native" or arguments.dtype == "float32"
        },
        "load_average": {"before": load_before, "after": os.getloadavg()},
    }
    _results.write(arguments, values)


if __name__ == "__main__":
    main()
