# SPDX-License-Identifier: Apache-2.0
"""Comparison of the encoder with others: parameters, tokens, latency, and the share of the machine's GEMM rate."""

import contextlib
import functools
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._optional import needs
from .bench_run import FORMAT, Progress, check_device
from .cases import Options
from .measuring import Clock, in_turns, surroundings
from .random_weights import encoder_config, random_model

__all__ = ["ENCODERS", "run_encoders"]


@dataclass(frozen=True)
class _Encoder:
    """An encoder: its name in timm (None for FastViTHD), and the sides, in pixels, at which it is measured."""

    timm_name: str | None
    sides: tuple[int, ...]
    timm_options: dict[str, Any] = field(default_factory=dict)


ENCODERS: dict[str, _Encoder] = {
    "FastViTHD": _Encoder(None, (256, 512, 768, 1024)),
    "ViT-L/14": _Encoder("vit_large_patch14_clip_224", (224, 336), {"dynamic_img_size": True}),
    "ViTamin-L": _Encoder("vitamin_large_224", (224, 256, 384), {"dynamic_img_size": True}),
    "ConvNeXt-L": _Encoder("convnext_large_mlp", (320, 512, 768, 1024)),
}
"""Encoders that the paper compares, at their usual resolutions in CLIP and in vision-language models."""

Forward = Callable[[torch.Tensor], torch.Tensor]

_FUSED = " fused"
_GEMM_SIDE = {"cpu": 2048}
_GEMM_RUNS = 5
_GEMM_SLOW_SECONDS = 30.0


def run_encoders(
    options: Options, only: tuple[str, ...] | None = None, progress: Progress = lambda done, total, doing: None
) -> dict[str, Any]:
    """Measure FastViTHD and timm's encoders alternately, in one process, on random pixels.

    Args:
        options: only dtypes, batches, device, threads, warm-up, repetitions, compile and fuse are used.
        only: names of `ENCODERS`; None for all.
        progress: called before each step: the number of steps done and in all, and the next one.

    Raises:
        ImportError: timm is missing.
        ValueError: an unknown name or device.
    """
    device = check_device(options.device)
    for name in only or ():
        if name not in ENCODERS:
            raise ValueError(f"there is no encoder {name!r}; expected {', '.join(ENCODERS)}.")
    chosen = {name: encoder for name, encoder in ENCODERS.items() if only is None or name in only}
    torch.set_num_threads(options.threads)
    clock = Clock(device)
    forms = [
        (form, encoder)
        for name, encoder in chosen.items()
        for form in ((name, name + _FUSED) if options.fuse and encoder.timm_name is None else (name,))
    ]
    rounds = len(options.batches) * (options.warmup + options.repetitions)
    total, done = len(options.dtypes) * (1 + len(forms) + rounds), itertools.count()

    def step(doing: str) -> None:
        progress(next(done), total, doing)

    results, rates = [], {}
    for dtype in options.dtypes:
        step(f"rate of matrix multiplications in {dtype}")
        rates[dtype] = _gemm_rate(getattr(torch, dtype), device, clock)
        built = {}
        for form, encoder in forms:
            step(f"building {form} {dtype}")
            built[form] = _build(form, encoder, getattr(torch, dtype), device, options.compile)
        for batch in options.batches:
            for result in _measure(built, dtype, batch, options, clock, step):
                operations = batch * _tokens_and_flops(result["model"], result["resolution"])[1]
                rate = operations / result["seconds"]["median"] / rates[dtype]
                results.append(result | {"share_of_gemm_rate": round(rate, 3)})
    return {
        "format": FORMAT,
        "kind": "encoders",
        **surroundings(device),
        "options": options.as_dict(),
        "gemm_flops_per_second": {name: float(f"{rate:.4g}") for name, rate in rates.items()},
        "results": results,
    }


@torch.inference_mode()
def _measure(
    built: dict[str, tuple[Forward, int]],
    dtype: str,
    batch: int,
    options: Options,
    clock: Clock,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    work = [(name, side) for name in built for side in ENCODERS[name.removesuffix(_FUSED)].sides]
    device = torch.device(options.device)
    pixels = {side: torch.rand(batch, 3, side, side).to(device, getattr(torch, dtype)) for _, side in work}
    times = in_turns(
        {(name, side): functools.partial(built[name][0], pixels[side]) for name, side in work},
        options.repetitions,
        warmup=options.warmup,
        clock=clock,
        progress=lambda line: progress(f"{dtype} batch {batch}: {line}"),
    )
    results = []
    for name, side in work:
        tokens, flops = _tokens_and_flops(name, side)
        seconds = times[name, side].spread()
        if device.type != "cpu":
            del seconds["processor_seconds"]
        about = {"model": name, "resolution": side, "dtype": dtype, "batch": batch, "parameters": built[name][1]}
        results.append(about | {"tokens": tokens, "gigaflop": round(batch * flops / 1e9, 1)} | seconds)
    return results


@functools.cache
def _tokens_and_flops(name: str, side: int) -> tuple[int, int]:
    """Return an encoder's tokens and floating-point operations for one image; a multiply-add counts as two.

    They are counted on fake tensors, without fast paths, since the counter does not know fused kernels.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    plain = name.removesuffix(_FUSED)
    ours = ENCODERS[plain].timm_name is None
    # timm reads tensor values while it builds a model, which fake tensors do not have; the meta device works.
    nowhere = torch.device("cpu" if ours else "meta")
    with FakeTensorMode() if ours else contextlib.nullcontext():
        forward, _ = _build(plain, ENCODERS[plain], torch.float32, nowhere, compiled=False)
        with FlopCounterMode(display=False) as counter:
            features = forward(torch.empty(1, 3, side, side, device=nowhere))
    return _tokens(features), counter.get_total_flops()


def _build(
    name: str, encoder: _Encoder, dtype: torch.dtype, device: torch.device, compiled: bool
) -> tuple[Forward, int]:
    """Return a function from pixels to features, and the number of parameters."""
    module: nn.Module
    forward: Callable[[torch.Tensor], Any]
    if encoder.timm_name is None:
        model: Any = random_model(encoder_config(), dtype, device)
        if name.endswith(_FUSED):
            from ..inference import fuse

            model = fuse(model) or model
        module = model.model.vision_tower
        forward = module.__call__
    else:
        with needs("timm", f"The encoder {encoder.timm_name}", 'pip install "transformers-fastvlm[bench]"'):
            import timm
        with device:
            module = timm.create_model(encoder.timm_name, num_classes=0, **encoder.timm_options)
        module = module.to(device, dtype).eval().requires_grad_(False)
        forward = module.forward_features  # type: ignore[assignment]
    if compiled:
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        forward = torch.compile(forward, mode=mode)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        output = forward(pixels)
        return output if isinstance(output, torch.Tensor) else output.last_hidden_state

    return features, sum(parameter.numel() for parameter in module.parameters())


def _tokens(features: torch.Tensor) -> int:
    """Count the tokens of (batch, channels, height, width), or of (batch, tokens, channels) without CLS."""
    if features.ndim == 4:
        return features.shape[2] * features.shape[3]
    return int(features.shape[1] ** 0.5) ** 2


@torch.inference_mode()
def _gemm_rate(dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    """Return the floating-point operations per second of a large matrix multiplication, a median of several runs."""
    side = _GEMM_SIDE.get(device.type, 8192)
    left, right = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    seconds = 0.0
    for repetitions in (1, _GEMM_RUNS):
        found = in_turns({"product": lambda: torch.mm(left, right)}, repetitions, warmup=0, clock=clock)
        seconds = statistics.median(found["product"].wall)
        if seconds > _GEMM_SLOW_SECONDS:
            break  # this CPU has no instructions for the dtype
    return 2 * side**3 / seconds
