# SPDX-License-Identifier: Apache-2.0
"""The options of a benchmark run, their checks, and the resulting list of cases."""

import os
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from transformers import AutoConfig

from ..checkpoints.embedded import resolve_model
from ..checkpoints.published import SIZES
from ..configuration_fastvlm import ENCODER_STRIDE, FastVLMConfig

__all__ = [
    "LEAST",
    "LLAVA_ONEVISION",
    "NATIVE",
    "SIZES",
    "Case",
    "Options",
    "cases",
    "check_at_least",
    "check_image",
    "fastvlm_config",
]

NATIVE = "native"
LLAVA_ONEVISION = "llava-onevision-0.5b"
LLAVA_ONEVISION_SIDE = 1152
MIN_SIDE, MAX_SIDE = 256, 2048
DTYPES = ("float32", "bfloat16", "float16")
IMAGE_BACKENDS = ("pil", "torchvision")
LEAST = {"threads": 1, "warmup": 0, "repetitions": 1}
"""Least values of the options of every kind of run."""


@dataclass(frozen=True)
class Case:
    """One model at one resolution, dtype and batch size, measured in a separate process.

    Attributes:
        label: name in tables; unique together with resolution, dtype and batch.
        kind: "fastvlm", "native", "llava-onevision" or "other".
        source: one of `SIZES` (that shape with random weights), "tiny", or the directory or hub repository of a
            checkpoint.
        resolution: height and width in pixels; None if the processor of an "other" model decides.
        reference: label and resolution of the case that this one is compared with; None for the reference.
        group: cases of one group run alternately.
    """

    label: str
    kind: str
    source: str
    resolution: int | None
    dtype: str
    batch: int
    group: int
    reference: tuple[str, int] | None = None
    fuse: bool = False


@dataclass(frozen=True)
class Options:
    """Options of a run; see `fastvlm bench --help`. If `sizes` is empty, each model runs at its native size.

    Raises:
        ValueError: a value is invalid; the message says what was expected.
    """

    models: tuple[str, ...] = ("0.5B",)
    against: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    batches: tuple[int, ...] = (1,)
    device: str = "cpu"
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    warmup: int = 1
    repetitions: int = 5
    new_tokens: int = 16
    prompt_tokens: int = 20
    image: str | None = None
    image_backend: str = "pil"
    attn_implementation: str | None = None
    compile: bool = False
    fuse: bool = False
    note: str | None = None

    def __post_init__(self) -> None:
        for name in ("models", "sizes", "dtypes", "batches"):
            values = getattr(self, name)
            if not values and name != "sizes":
                raise ValueError(f"{name} is empty; name at least one.")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} is {', '.join(map(str, values))}: a value occurs twice. Name each once.")
        for side in self.sizes:
            if side % ENCODER_STRIDE or not MIN_SIDE <= side <= MAX_SIDE:
                raise ValueError(
                    f"size is {side}; expected a multiple of {ENCODER_STRIDE} from {MIN_SIDE} to {MAX_SIDE}, such as "
                    "512 or 1024."
                )
        _one_of("dtype", self.dtypes, DTYPES)
        _one_of("image backend", (self.image_backend,), IMAGE_BACKENDS)
        # The second token is timed separately, and a rate needs two more.
        for batch in self.batches:
            check_at_least("batch", batch, 1)
        for name, low in (*LEAST.items(), ("new_tokens", 4), ("prompt_tokens", 2)):
            check_at_least(name, getattr(self, name), low)
        check_image(self.image)
        for name in self.models:
            if name in (NATIVE, LLAVA_ONEVISION):
                raise ValueError(f"{name!r} is not a FastVLM, but a model to compare with; use --against {name}.")
        _check_sources((*self.models, *(name for name in self.against if name not in (NATIVE, LLAVA_ONEVISION))))

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def cases(options: Options) -> list[Case]:
    """Return the cases of these options, in the order in which they run.

    Each group contains a model as the reference, its fused form and the native model. LLaVA-OneVision and other models
    have fixed resolutions, so they run once for each dtype and batch size, in the first group of the largest
    resolution.
    """
    found: list[Case] = []
    sizes = {model: options.sizes or (int(fastvlm_config(model).vision_config.image_size),) for model in options.models}
    pairs = [(model, side) for model in options.models for side in sizes[model]]
    combinations = [(dtype, batch, *pair) for dtype, batch, pair in product(options.dtypes, options.batches, pairs)]
    for group, (dtype, batch, model, side) in enumerate(combinations):
        label = model if model in SIZES else os.path.basename(model.rstrip("/"))
        reference = (label, side)
        common: dict[str, Any] = {"dtype": dtype, "batch": batch, "group": group}
        found.append(Case(label, "fastvlm", model, side, **common))
        if options.fuse:
            found.append(Case(f"{label} fused", "fastvlm", model, side, **common, reference=reference, fuse=True))
        for name in options.against:
            common["reference"] = reference
            if name == NATIVE:
                found.append(Case(f"{label} native", NATIVE, model, side, **common))
            elif model == options.models[0] and side == max(sizes[model]):
                if name == LLAVA_ONEVISION:
                    found.append(Case("LLaVA-OneVision-0.5B", "llava-onevision", name, LLAVA_ONEVISION_SIDE, **common))
                else:
                    found.append(Case(os.path.basename(name.rstrip("/")), "other", name, None, **common))
    return found


def fastvlm_config(model: str) -> Any:
    """Return the configuration of one of `SIZES` or of a FastVLM checkpoint."""
    if model in SIZES:
        return FastVLMConfig.from_preset(model)
    config: Any = AutoConfig.from_pretrained(resolve_model(model))
    if not isinstance(config, FastVLMConfig):
        raise ValueError(
            f"{model!r} has model_type {config.model_type!r}; expected a FastVLM. To compare with another model, use "
            f"--against {model}."
        )
    return config


def check_at_least(name: str, value: int, low: int) -> None:
    """Raise ValueError unless an option has at least the value `low`."""
    if value < low:
        raise ValueError(f"{name} is {value}; expected at least {low}.")


def check_image(path: str | None) -> None:
    """Raise ValueError if a path is given that is not a file."""
    if path is not None and not os.path.isfile(path):
        raise ValueError(f"there is no image at {path!r}; name a file, or leave it out for a drawn image.")


def _one_of(what: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    for value in values:
        if value not in allowed:
            raise ValueError(f"{what} is {value!r}; expected {', '.join(allowed)}.")


def _check_sources(names: tuple[str, ...]) -> None:
    for name in names:
        if name in SIZES or os.path.isfile(os.path.join(resolve_model(name), "config.json")):
            continue
        if name.count("/") != 1 or name.startswith((".", "/")) or os.path.exists(name):
            raise ValueError(
                f"{name!r} is neither a size ({', '.join(SIZES)}), nor a directory with a config.json, nor the name of "
                f"a hub repository. --against also takes {NATIVE} and {LLAVA_ONEVISION}."
            )
